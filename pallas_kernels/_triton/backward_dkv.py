"""Backward kernel in Pallas-Triton for the gradients of keys and values, by tiles of keys.

It loops over the query heads of a group, so nothing is summed afterwards and no atomics are
needed. A sink is seen by many more queries than its neighbours. What distant queries add
(`_masks.min_sink_distance`) comes from a launch of its own (`backward_sinks`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._kernels import Queries
from pallas_kernels._logits import cap_logits
from pallas_kernels._masks import is_real, sees_except_distant_sinks
from pallas_kernels._spec import KeyRun, Spec
from pallas_kernels._tile_ranges import query_plan, sink_chunk_plan, with_padding
from pallas_kernels._triton.blocks import (
    batch_block,
    bounds_blocks,
    bounds_operands,
    div,
    dot,
    exp2_scaled,
    head_parts,
    inner,
    load_bounds,
    load_rows,
    load_vector,
    log2_sums,
    real_keys,
    rem,
    store_rows,
)
from pallas_kernels._triton.tiles import TritonTiles
from pallas_kernels._varying import shape_like_varying


class DistantSinks(NamedTuple):
    """Gradients of sinks through distant queries, as `_masks.min_sink_distance` defines them.

    ``parts`` are dkey and dvalue by chunk of queries, [chunks, B, num_sinks, K, H]: row p is of
    the p-th sink on this shard of the sequence that the chunk's first query is in. None where no
    query is distant.
    """

    parts: tuple[Array, Array] | None
    chunk: int
    min_distance: int


def backward_dkv(
    spec: Spec,
    queries: Queries,
    run: KeyRun,
    distant: DistantSinks | None,
    *,
    rows: int,
    out_dtype: jnp.dtype,
    tiles: TritonTiles,
    wanted: tuple[bool, bool],
    interpret: bool,
) -> Sequence[Array]:
    """Gradients of the keys and values of a run through the first ``rows`` queries.

    Args:
        spec: static settings.
        queries: all queries, and what belongs to them.
        run: keys and values.
        distant: what distant queries add to the run's sinks; None if it holds no sinks.
        rows: number of queries.
        out_dtype: of the gradients.
        tiles: tile sizes.
        wanted: which of dkey and dvalue to compute.
        interpret: run in the interpreter.

    Returns:
        The wanted gradients.
    """
    batch, length, num_kv, _ = run.key.shape
    key_value = (run.key, run.value)
    group = queries.query.shape[2] // num_kv
    start, packed = queries.start, queries.start.ndim > 0
    head_blocks = group // tiles.heads
    num_sinks, min_distance = (0, 0) if distant is None else (spec.num_sinks, distant.min_distance)
    plan = _plan(spec, queries, run, rows, tiles, num_sinks, min_distance)
    arrays, blocks = query_operands(queries, group)
    arrays |= {"plan": plan if packed else plan[None], "keys": key_value}
    blocks |= {"plan": batch_block(arrays["plan"]), "keys": tuple(map(key_block, key_value))}
    if distant is not None and distant.parts is not None:
        chunks = sink_chunk_plan(
            start,
            num_sinks,
            rows=rows,
            chunk=distant.chunk,
            offset=run.offset,
            length=length,
            key_tile=tiles.key,
        )
        arrays["chunks"] = chunks if packed else chunks[None]
        arrays["from_distant"] = [x for x, want in zip(distant.parts, wanted, strict=True) if want]
        blocks["chunks"] = batch_block(arrays["chunks"])
        blocks["from_distant"] = [_parts_block(x) for x in arrays["from_distant"]]
    shapes = [
        shape_like_varying(queries.query, x.shape, out_dtype)
        for x, want in zip(key_value, wanted, strict=True)
        if want
    ]

    def kernel(refs, *out_refs):
        index = pl.program_id(0)
        first_key = index * tiles.key
        local = first_key + jnp.arange(tiles.key, dtype=jnp.int32)
        exists = local < length if length % tiles.key else None
        key_rows = (pl.ds(first_key, tiles.key),)
        keys = [load_rows(ref, key_rows, exists) for ref in refs["keys"]]
        j = run.offset + local[:, None]

        def seen(i, start, end):
            return sees_except_distant_sinks(
                i, j, start, spec.window, num_sinks, min_distance, packed=packed, end=end
            )

        def over(begin, end, acc, masked, padded=False):
            def body(begin, block, acc):
                mask = seen if masked else None
                tile = load_queries(
                    refs, tiles, begin, rows, block, mask, packed=packed, padded=padded
                )
                return add_gradients(spec, keys, tile, acc, wanted, interpret)

            return _over_query_tiles(begin, end, tiles.query, head_blocks, body, acc)

        acc = zero_gradients(tiles.key, key_value, wanted)
        begin, unmasked_begin, unmasked_end, end = (refs["plan"][index, n] for n in range(4))
        if packed:
            # Queries whose loads wait for their starts arrive late: only where there is padding.
            stop = jnp.where(refs["plan"][index, 4] > 0, end, begin)
            acc = over(begin, stop, acc, True, padded=True)
            begin, unmasked_begin, unmasked_end = (
                jnp.maximum(x, stop) for x in (begin, unmasked_begin, unmasked_end)
            )
        if tiles.unmasked_loop:
            acc = over(begin, unmasked_begin, acc, True)
            acc = over(unmasked_begin, unmasked_end, acc, False)
            acc = over(unmasked_end, end, acc, True)
        else:
            acc = over(begin, end, acc, True)
        results = scaled_gradients(spec, acc, wanted)
        if "from_distant" in refs:
            assert distant is not None

            results = _add_from_distant_queries(
                refs, distant, run.offset, local, num_sinks, results
            )
        if packed:
            real = real_keys(refs, spec, run.offset, local, exists)[:, None]
            results = [[jnp.where(real, x, 0.0) for x in result] for result in results]
        for out_ref, result in zip(out_refs, results, strict=True):
            store_rows(out_ref, key_rows, result, exists)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(length, tiles.key), num_kv, batch),
        in_specs=[blocks],
        out_specs=[key_block(x) for x in shapes],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="ring_swa_backward_keys",
    )(arrays)


def _plan(
    spec: Spec,
    queries: Queries,
    run: KeyRun,
    rows: int,
    tiles: TritonTiles,
    num_sinks: int,
    min_distance: int,
) -> Array:
    """`query_plan`, and whether the queries include padding where they may."""
    start, end = queries.start, queries.end
    plan = query_plan(
        start,
        spec.window,
        num_sinks,
        rows=rows,
        query_tile=tiles.query,
        offset=run.offset,
        length=run.key.shape[1],
        key_tile=tiles.key,
        min_distance=min_distance,
        end=end,
    )
    if not start.ndim:
        return plan
    return with_padding(plan, start, plan[..., 0], plan[..., 3], tiles.query, end)


def _over_query_tiles(begin, end, size: int, head_blocks: int, body: Callable, acc):
    """``acc = body(first query, block of heads, acc)`` for tiles of all heads of the group.

    One loop over both, as a loop in a loop would fill its pipeline of loads again and again.
    """
    count = end - begin
    inverse = 1 / count.astype(jnp.float32)

    def step(n, acc):
        block = jnp.int32(0)
        if head_blocks > 1:
            # Exact for so few numbers, and much faster than to divide integers.
            block = ((n.astype(jnp.float32) + 0.5) * inverse).astype(jnp.int32)
            n = n - block * count
        return body((begin + n) * size, block, acc)

    return lax.fori_loop(0, count * head_blocks, step, acc)


def _add_from_distant_queries(
    refs, distant: DistantSinks, offset: int, local: Array, num_sinks: int, results
):
    """Adds what chunks of distant queries found for the sinks among the keys ``local``."""
    index, packed = pl.program_id(0), refs["start"].shape[0] > 1

    def add_chunk(c, results):
        chunk_start = refs["start"][c * distant.chunk if packed else 0]
        first_sink = chunk_start - offset if offset else chunk_start
        row = local - jnp.maximum(first_sink, 0)
        own = (row >= 0) & (row < num_sinks)
        parts = (
            load_rows(ref, (c, jnp.clip(row, 0, num_sinks - 1)), own)
            for ref in refs["from_distant"]
        )
        return [
            [x + y for x, y in zip(result, part, strict=True)]
            for result, part in zip(results, parts, strict=True)
        ]

    first_chunk, end_chunk = refs["chunks"][index, 0], refs["chunks"][index, 1]
    return lax.fori_loop(first_chunk, end_chunk, add_chunk, results)


def query_operands(queries: Queries, group: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and blocks of a group of query heads, for a grid that ends in (K, B)."""

    def heads(x):
        return pl.BlockSpec((None, x.shape[1], group, x.shape[3]), lambda t, n, b: (b, 0, n, 0))

    def values(x):
        return pl.BlockSpec((None, group, x.shape[2]), lambda t, n, b: (b, n, 0))

    arrays = {
        "query": queries.query,
        "dout": queries.dout,
        "lse": queries.lse,
        "delta": queries.delta,
        **bounds_operands(queries.start, queries.end),
    }
    blocks = {
        "query": heads(queries.query),
        "dout": heads(queries.dout),
        "lse": values(queries.lse),
        "delta": values(queries.delta),
        **bounds_blocks(arrays),
    }
    return arrays, blocks


def key_block(x: Any) -> pl.BlockSpec:
    """All rows of a head of [B, rows, K, dim]."""
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda t, n, b: (b, 0, n, 0))


def _parts_block(x: Any) -> pl.BlockSpec:
    """The parts of all chunks for a key head, of [chunks, B, num_sinks, K, dim]."""
    block = (x.shape[0], None, x.shape[2], None, x.shape[4])
    return pl.BlockSpec(block, lambda t, n, b: (0, b, 0, n, 0))


class QueryTile(NamedTuple):
    """A tile of queries of one head, and which keys they see ([S, Q]; None: all)."""

    queries: list[Array]
    douts: list[Array]
    lse_log2: Array
    delta: Array
    seen: Array | None


def load_queries(
    refs, tiles: TritonTiles, begin, end, block, seen, *, packed: bool, padded: bool = False
) -> QueryTile:
    """Loads the queries at ``begin`` of a block of heads, none at or behind ``end``.

    ``seen(i, start, end)`` is the mask, None where all is seen. Padding counts as zeros if
    ``padded``.
    """
    size, heads = tiles.query, tiles.heads
    if heads == 1:
        positions = begin + jnp.arange(size, dtype=jnp.int32)
        rows, flat = (pl.ds(begin, size), block), (block, pl.ds(begin, size))
    else:
        row = jnp.arange(size * heads, dtype=jnp.int32)
        positions, head = begin + div(row, heads), block * heads + rem(row, heads)
        rows, flat = (positions, head), (head, positions)
    ragged = not isinstance(end, int) or end % size
    valid = positions < end if seen is not None and ragged else None
    mask = None
    if seen is not None:
        start, end = load_bounds(refs, positions, valid, packed=packed)
        mask = seen(positions[None, :], _as_row(start), None if end is None else _as_row(end))
        mask = mask if valid is None else mask & valid[None, :]
        if padded:
            real = is_real(positions, start, end)
            valid = real if valid is None else real & valid
    return QueryTile(
        load_rows(refs["query"], rows, valid),
        load_rows(refs["dout"], rows, valid),
        log2_sums(load_vector(refs["lse"], flat, valid)),
        load_vector(refs["delta"], flat, valid),
        mask,
    )


def _as_row(x: Array) -> Array:
    """[Q] as [1, Q]; a scalar as it is."""
    return x[None, :] if x.ndim else x


def zero_gradients(size: int, key_value: tuple[Any, Any], wanted: tuple[bool, bool]):
    """(dkey, dvalue) in head parts, empty where not wanted."""
    return tuple(
        tuple(jnp.zeros((size, width), jnp.float32) for _, width in head_parts(x.shape[-1]))
        if want
        else ()
        for want, x in zip(wanted, key_value, strict=True)
    )


def add_gradients(
    spec: Spec,
    key_value: list[list[Array]],
    tile: QueryTile,
    acc,
    wanted: tuple[bool, bool],
    interpret,
):
    """Adds the part of a tile of queries to (dkey / scale, dvalue)."""
    key, value = key_value
    dtype = key[0].dtype
    logits, factor, dcap = cap_logits(spec, inner(spec, key, tile.queries))
    weights = exp2_scaled(logits, factor, tile.lse_log2[None, :], interpret=interpret)
    if tile.seen is not None:
        weights = jnp.where(tile.seen, weights, 0.0)
    dkey, dvalue = acc
    if wanted[0]:
        dlogits = weights * (inner(spec, value, tile.douts) - tile.delta[None, :])
        dlogits = (dlogits if dcap is None else dlogits * dcap).astype(dtype)
        dkey = tuple(x + dot(spec, dlogits, q) for x, q in zip(dkey, tile.queries, strict=True))
    if wanted[1]:
        weights = weights.astype(dtype)
        dvalue = tuple(x + dot(spec, weights, d) for x, d in zip(dvalue, tile.douts, strict=True))
    return dkey, dvalue


def scaled_gradients(spec: Spec, acc, wanted: tuple[bool, bool]) -> list[list[Array]]:
    """The wanted ones of (dkey, dvalue)."""
    dkey, dvalue = acc
    results = ([x * spec.scale for x in dkey], list(dvalue))
    return [x for x, want in zip(results, wanted, strict=True) if want]
