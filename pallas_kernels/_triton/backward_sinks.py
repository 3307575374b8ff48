"""Backward kernel in Pallas-Triton for sinks of distant queries: by chunks of queries.

All queries of a long sequence see its few sinks, so chunks of queries share that work. Each chunk
leaves a partial gradient, in float32, to be added in a fixed order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._kernels import Queries
from pallas_kernels._masks import min_sink_distance, sees_distant_sink, sees_fetched_sink
from pallas_kernels._sink_ranges import keys_before_shard, sink_query_plan
from pallas_kernels._spec import KeyRun, Spec, minus
from pallas_kernels._triton.backward_dkv import DistantSinks
from pallas_kernels._triton.blocks import batch_block, div, load_rows, rem, store_rows
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

SINK_CHUNK = 512
"""Queries of a program: enough programs for a GPU, and few partial results."""


BOTH = (True, True)


def backward_own_sinks(
    spec: Spec, queries: Queries, run: KeyRun, *, rows: int, tiles: TritonTiles, interpret: bool
) -> DistantSinks:
    """What distant queries add to the gradients of sinks among the shard's own keys."""
    chunk = _chunk(tiles)
    min_distance = min_sink_distance(spec.window, spec.num_sinks, chunk, spec.lookahead)
    if min_distance >= rows + spec.lookahead + spec.num_sinks:
        return DistantSinks(None, chunk, min_distance)

    def seen(i, j, start):
        return sees_distant_sink(i, j, start, spec.num_sinks, min_distance)

    def locate(chunk_start):
        first = jnp.maximum(chunk_start, spec.first_key)
        return minus(first, spec.first_key), first, chunk_start + spec.num_sinks - first

    sinks = _Sinks(min_distance, seen, locate)
    parts = _by_chunks(
        spec, queries, (run.key, run.value), sinks, rows=rows, tiles=tiles, interpret=interpret
    )
    return DistantSinks(parts, chunk, min_distance)


def backward_fetched_sinks(
    spec: Spec,
    queries: Queries,
    key_value: tuple[Array, Array],
    *,
    rows: int,
    tiles: TritonTiles,
    interpret: bool,
) -> tuple[Array, Array]:
    """Gradients of fetched sinks by chunk of queries, to be summed over the first axis."""
    assert spec.window is not None
    window = spec.window

    def seen(i, j, start):
        return sees_fetched_sink(i, j, start, window, spec.num_sinks, first_key=spec.first_key)

    def locate(chunk_start):
        count = jnp.minimum(keys_before_shard(chunk_start, spec.first_key), spec.num_sinks)
        return 0, chunk_start, count

    sinks = _Sinks(window + 1, seen, locate)
    return _by_chunks(spec, queries, key_value, sinks, rows=rows, tiles=tiles, interpret=interpret)


def _chunk(tiles: TritonTiles) -> int:
    return max(SINK_CHUNK, tiles.query)


class _Sinks(NamedTuple):
    """Which sinks a launch is for.

    Attributes:
        min_distance: of a query from its sequence's start, for ``seen`` to hold anything.
        seen: mask of (query, key, start) positions.
        locate: from the sequence's start, (row of its first sink here, its position, how many).
    """

    min_distance: int
    seen: Callable[[Array, Array, Array], Array]
    locate: Callable[[Array], tuple[Any, Any, Any]]


def _by_chunks(
    spec: Spec,
    queries: Queries,
    key_value: tuple[Array, Array],
    sinks: _Sinks,
    *,
    rows: int,
    tiles: TritonTiles,
    interpret: bool,
) -> tuple[Array, Array]:
    """Gradients of the sinks of the sequence that the first query of each chunk is in.

    Args:
        spec: static settings.
        queries: all queries, and what belongs to them.
        key_value: keys and values that hold the sinks.
        sinks: which ones.
        rows: number of queries.
        tiles: tile sizes; a tile of keys holds sinks only.
        interpret: run in the interpreter.

    Returns:
        dkey and dvalue, [chunks, B, num_sinks, K, H] in float32.
    """
    batch, _, num_kv, _ = key_value[0].shape
    group, chunk = queries.query.shape[2] // num_kv, _chunk(tiles)
    packed = queries.start.ndim > 0
    plan = sink_query_plan(
        queries.start, sinks.min_distance, rows=rows, query_tile=tiles.query, chunk=chunk
    )
    arrays, blocks = query_operands(queries, group)
    arrays |= {"plan": plan if packed else plan[None], "keys": key_value}
    blocks |= {"plan": batch_block(arrays["plan"]), "keys": tuple(map(key_block, key_value))}
    num_chunks = pl.cdiv(rows, chunk)
    key_tiles = pl.cdiv(spec.num_sinks, tiles.key)
    shapes = [
        shape_like_varying(
            queries.query, (num_chunks, batch, spec.num_sinks, num_kv, x.shape[3]), jnp.float32
        )
        for x in key_value
    ]

    kernel = _Kernel(spec, sinks, rows, group // tiles.heads, packed, tiles, interpret)
    dkey, dvalue = pl.pallas_call(
        kernel.run,
        grid=(num_chunks * key_tiles, num_kv, batch),
        in_specs=[blocks],
        out_specs=[
            pl.BlockSpec(
                (None, None, spec.num_sinks, None, x.shape[4]),
                lambda t, n, b: (div(t, key_tiles), b, 0, n, 0),
            )
            for x in shapes
        ],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="ring_swa_backward_sinks",
    )(arrays)
    return dkey, dvalue


class _Kernel(NamedTuple):
    """What a program does.

    Attributes:
        spec: static settings.
        sinks: which sinks the launch is for.
        rows: number of queries.
        head_blocks: tiles of heads of a group.
        packed: whether there are documents.
        tiles: tile sizes.
        interpret: run in the interpreter.
    """

    spec: Spec
    sinks: _Sinks
    rows: int
    head_blocks: int
    packed: bool
    tiles: TritonTiles
    interpret: bool

    def run(self, refs: dict[str, Any], *out_refs: Any) -> None:
        """Computes the gradients of a tile of sinks through a chunk of queries."""
        spec, tiles, head_blocks = self.spec, self.tiles, self.head_blocks
        key_tiles = pl.cdiv(spec.num_sinks, tiles.key)
        index = div(pl.program_id(0), key_tiles)
        first_slot = rem(pl.program_id(0), key_tiles) * tiles.key
        slots = first_slot + jnp.arange(tiles.key, dtype=jnp.int32)
        chunk_start = refs["start"][index * _chunk(tiles) if self.packed else 0]
        row, position, count = self.sinks.locate(chunk_start)
        count = jnp.minimum(count, refs["keys"][0].shape[0] - row)
        exists = slots < count
        key_rows = (pl.ds(row + first_slot, tiles.key),)
        keys = [load_rows(ref, key_rows, exists) for ref in refs["keys"]]

        def seen(i, start, end):
            del end  # a sink of a query's sequence is before its end
            return self.sinks.seen(i, position + slots[:, None], start) & exists[:, None]

        def step(n, acc):
            begin = (first_tile + div(n, head_blocks)) * tiles.query
            tile = load_queries(
                refs, tiles, begin, end_query, rem(n, head_blocks), seen, packed=self.packed
            )
            return add_gradients(spec, keys, tile, acc, BOTH, self.interpret)

        first_tile, end_tile = refs["plan"][index, 0], refs["plan"][index, 1]
        # Queries behind the sequence's last may be padding.
        end_query = refs["plan"][index, 2] if self.packed else self.rows
        steps = jnp.where(count > first_slot, (end_tile - first_tile) * head_blocks, 0)
        dims = refs["keys"][0].shape[-1], refs["keys"][1].shape[-1]
        acc = lax.fori_loop(0, steps, step, zero_gradients(tiles.key, dims, BOTH))
        for out_ref, result in zip(out_refs, scaled_gradients(spec, acc, BOTH), strict=True):
            store_rows(out_ref, (pl.ds(first_slot, tiles.key),), result, slots < spec.num_sinks)
