"""Backward kernel in Pallas-Triton for the gradients of keys and values, by tiles of keys.

It loops over the query heads of a group, so nothing is summed afterwards and no atomics are
needed. A sink is seen by many more queries than its neighbours. What distant queries add
(`_masks.min_sink_distance`) comes from a launch of its own (`backward_sinks`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._kernels import Queries
from pallas_kernels._sink_ranges import sink_chunk_plan
from pallas_kernels._spec import KeyRun, Spec
from pallas_kernels._tile_ranges import QueryColumns, query_plan, with_padding
from pallas_kernels._triton.blocks import batch_block
from pallas_kernels._triton.dkv_program import DkvProgram
from pallas_kernels._triton.query_tiles import key_block, query_operands
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
    program = DkvProgram(
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
    arrays, blocks = _operands(program, queries, run, distant)
    shapes = [
        shape_like_varying(queries.query, x.shape, out_dtype)
        for x, want in zip((run.key, run.value), wanted, strict=True)
        if want
    ]
    return pl.pallas_call(
        program.run,
        grid=(pl.cdiv(length, tiles.key), num_kv, batch),
        in_specs=[blocks],
        out_specs=[key_block(x) for x in shapes],
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="ring_swa_backward_keys",
    )(arrays)


def _operands(
    program: DkvProgram, queries: Queries, run: KeyRun, distant: DistantSinks | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays that a program reads, and their blocks."""
    key_value = (run.key, run.value)
    plan = _plan(program, queries)
    arrays, blocks = query_operands(queries, program.group)
    arrays |= {"plan": plan if program.packed else plan[None], "keys": key_value}
    blocks |= {"plan": batch_block(arrays["plan"]), "keys": tuple(map(key_block, key_value))}
    if distant is None or distant.parts is None:
        return arrays, blocks
    chunks = sink_chunk_plan(
        queries.start,
        program.num_sinks,
        rows=program.rows,
        chunk=program.distant_chunk,
        offset=program.offset,
        length=program.length,
        key_tile=program.tiles.key,
    )
    arrays["chunks"] = chunks if program.packed else chunks[None]
    parts = [x for x, want in zip(distant.parts, program.wanted, strict=True) if want]
    arrays["from_distant"] = parts
    blocks["chunks"] = batch_block(arrays["chunks"])
    blocks["from_distant"] = [_parts_block(x) for x in parts]
    return arrays, blocks


def _plan(program: DkvProgram, queries: Queries) -> Array:
    """`query_plan`, and whether the queries include padding where they may."""
    start, end = queries.start, queries.end
    plan = query_plan(
        start,
        program.spec.window,
        program.num_sinks,
        rows=program.rows,
        query_tile=program.tiles.query,
        offset=program.offset,
        length=program.length,
        key_tile=program.tiles.key,
        min_distance=program.min_distance,
        end=end,
    )
    if not start.ndim:
        return plan
    begin, stop = plan[..., QueryColumns.BEGIN], plan[..., QueryColumns.END]
    return with_padding(plan, start, begin, stop, program.tiles.query, end)


def _parts_block(x: Any) -> pl.BlockSpec:
    """The parts of all chunks for a key head, of [chunks, B, num_sinks, K, dim]."""
    block = (x.shape[0], None, x.shape[2], None, x.shape[4])
    return pl.BlockSpec(block, lambda t, n, b: (0, b, 0, n, 0))
