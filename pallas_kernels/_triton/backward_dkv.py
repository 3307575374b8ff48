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
from pallas_kernels._masks import sees_except_distant_sinks
from pallas_kernels._sink_ranges import sink_chunk_plan
from pallas_kernels._spec import KeyRun, Spec
from pallas_kernels._tile_ranges import QueryColumns, query_plan, with_padding
from pallas_kernels._triton.blocks import batch_block, load_rows, real_keys, store_rows
from pallas_kernels._triton.query_tiles import (
    add_gradients,
    key_block,
    load_queries,
    query_operands,
    scaled_gradients,
    zero_gradients,
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
    launch = _Launch(
        spec=spec,
        offset=run.offset,
        length=length,
        rows=rows,
        group=queries.query.shape[2] // num_kv,
        packed=queries.start.ndim > 0,
        num_sinks=0 if distant is None else spec.num_sinks,
        min_distance=0 if distant is None else distant.min_distance,
        distant_chunk=0 if distant is None else distant.chunk,
        dims=(run.key.shape[3], run.value.shape[3]),
        tiles=tiles,
        wanted=wanted,
        interpret=interpret,
    )
    arrays, blocks = launch.operands(queries, run, distant)
    shapes = [
        shape_like_varying(queries.query, x.shape, out_dtype)
        for x, want in zip((run.key, run.value), wanted, strict=True)
        if want
    ]
    return pl.pallas_call(
        launch.kernel,
        grid=(pl.cdiv(length, tiles.key), num_kv, batch),
        in_specs=[blocks],
        out_specs=[key_block(x) for x in shapes],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="ring_swa_backward_keys",
    )(arrays)


class _Launch(NamedTuple):
    """A launch, and what its programs do.

    Attributes:
        spec: static settings.
        offset: position of the run's first key.
        length: keys of the run.
        rows: number of queries.
        group: query heads of a head of keys.
        packed: whether there are documents.
        num_sinks: sinks to look for in the run.
        min_distance: of distant queries, whose sinks have a launch of their own.
        distant_chunk: queries of a chunk of that launch.
        dims: H and Hv.
        tiles: tile sizes.
        wanted: which of dkey and dvalue to compute.
        interpret: run in the interpreter.
    """

    spec: Spec
    offset: int
    length: int
    rows: int
    group: int
    packed: bool
    num_sinks: int
    min_distance: int
    distant_chunk: int
    dims: tuple[int, int]
    tiles: TritonTiles
    wanted: tuple[bool, bool]
    interpret: bool

    def operands(
        self, queries: Queries, run: KeyRun, distant: DistantSinks | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays that a program reads, and their blocks."""
        key_value = (run.key, run.value)
        plan = self._plan(queries)
        arrays, blocks = query_operands(queries, self.group)
        arrays |= {"plan": plan if self.packed else plan[None], "keys": key_value}
        blocks |= {"plan": batch_block(arrays["plan"]), "keys": tuple(map(key_block, key_value))}
        if distant is None or distant.parts is None:
            return arrays, blocks
        chunks = sink_chunk_plan(
            queries.start,
            self.num_sinks,
            rows=self.rows,
            chunk=self.distant_chunk,
            offset=self.offset,
            length=self.length,
            key_tile=self.tiles.key,
        )
        arrays["chunks"] = chunks if self.packed else chunks[None]
        parts = [x for x, want in zip(distant.parts, self.wanted, strict=True) if want]
        arrays["from_distant"] = parts
        blocks["chunks"] = batch_block(arrays["chunks"])
        blocks["from_distant"] = [_parts_block(x) for x in parts]
        return arrays, blocks

    def _plan(self, queries: Queries) -> Array:
        """`query_plan`, and whether the queries include padding where they may."""
        start, end = queries.start, queries.end
        plan = query_plan(
            start,
            self.spec.window,
            self.num_sinks,
            rows=self.rows,
            query_tile=self.tiles.query,
            offset=self.offset,
            length=self.length,
            key_tile=self.tiles.key,
            min_distance=self.min_distance,
            end=end,
        )
        if not start.ndim:
            return plan
        begin, stop = plan[..., QueryColumns.BEGIN], plan[..., QueryColumns.END]
        return with_padding(plan, start, begin, stop, self.tiles.query, end)

    def kernel(self, refs, *out_refs) -> None:
        """Computes the gradients of a tile of keys."""
        index = pl.program_id(0)
        first_key = index * self.tiles.key
        local = first_key + jnp.arange(self.tiles.key, dtype=jnp.int32)
        exists = local < self.length if self.length % self.tiles.key else None
        key_rows = (pl.ds(first_key, self.tiles.key),)
        keys = [load_rows(ref, key_rows, exists) for ref in refs["keys"]]
        results = scaled_gradients(self.spec, self._sums(refs, index, keys, local), self.wanted)
        if "from_distant" in refs:
            results = self._add_from_distant_queries(refs, local, results)
        if self.packed:
            real = real_keys(refs, self.spec, self.offset, local, exists)[:, None]
            results = [[jnp.where(real, x, 0.0) for x in result] for result in results]
        for out_ref, result in zip(out_refs, results, strict=True):
            store_rows(out_ref, key_rows, result, exists)

    def _sums(self, refs, index: Array, keys: list[list[Array]], local: Array):
        """(dkey / scale, dvalue) of the keys ``local`` through the queries of the plan."""
        tiles = self.tiles
        j = self.offset + local[:, None]

        def seen(i, start, end):
            return sees_except_distant_sinks(
                i, j, start, self.spec.window, self.num_sinks, self.min_distance,
                packed=self.packed, end=end,
            )  # fmt: skip

        def over(begin, end, acc, masked, padded=False):
            def body(begin, block, acc):
                mask = seen if masked else None
                tile = load_queries(
                    refs, tiles, begin, self.rows, block, mask, packed=self.packed, padded=padded
                )
                return add_gradients(self.spec, keys, tile, acc, self.wanted, self.interpret)

            head_blocks = self.group // tiles.heads
            return _over_query_tiles(begin, end, tiles.query, head_blocks, body, acc)

        acc = zero_gradients(tiles.key, self.dims, self.wanted)
        begin, unmasked_begin, unmasked_end, end = (
            refs["plan"][index, n] for n in QueryColumns.ALL
        )
        if self.packed:
            # Queries whose loads wait for their starts arrive late: only where there is padding.
            stop = jnp.where(refs["plan"][index, QueryColumns.HAS_PADDING] > 0, end, begin)
            acc = over(begin, stop, acc, True, padded=True)
            begin, unmasked_begin, unmasked_end = (
                jnp.maximum(x, stop) for x in (begin, unmasked_begin, unmasked_end)
            )
        if not tiles.unmasked_loop:
            return over(begin, end, acc, True)
        acc = over(begin, unmasked_begin, acc, True)
        acc = over(unmasked_begin, unmasked_end, acc, False)
        return over(unmasked_end, end, acc, True)

    def _add_from_distant_queries(self, refs, local: Array, results):
        """Adds what chunks of distant queries found for the sinks among the keys ``local``."""
        index, num_sinks = pl.program_id(0), self.num_sinks

        def add_chunk(c, results):
            chunk_start = refs["start"][c * self.distant_chunk if self.packed else 0]
            first_sink = chunk_start - self.offset if self.offset else chunk_start
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


def _parts_block(x: Any) -> pl.BlockSpec:
    """The parts of all chunks for a key head, of [chunks, B, num_sinks, K, dim]."""
    block = (x.shape[0], None, x.shape[2], None, x.shape[4])
    return pl.BlockSpec(block, lambda t, n, b: (0, b, 0, n, 0))
