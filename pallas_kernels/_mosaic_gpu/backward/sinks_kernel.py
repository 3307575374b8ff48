"""Kernel in Mosaic GPU, for Hopper, of the gradients through sinks that windows do not reach.

It runs after a fused kernel and finishes the gradients of queries, of which it reads and writes
every tile anyway (`dq_postprocess.DqPostprocess`). A program has one query head and a chunk of the
queries. A chunk is no longer than a window, so all of its queries that see sinks beyond their
windows are of one sequence: that of the chunk's first query. So a program has one tile of sinks.
What its queries add to the gradients of these sinks it keeps in registers, and writes in float32
(`sinks_program`); `sinks` adds that up over chunks.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32, Int

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqPostprocess, DqSums
from pallas_kernels._mosaic_gpu.backward.launch import launch
from pallas_kernels._mosaic_gpu.backward.sinks_config import SinkConfig
from pallas_kernels._mosaic_gpu.backward.sinks_program import SinkProgram
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._spec import Spec

MAX_CHUNK = 512
"""Queries of a chunk at most: enough programs for a GPU, and few partial sums."""


def chunk_length(window: int) -> int:
    """Queries of a chunk: whole tiles, no longer than ``window`` and a query's own key."""
    return min(MAX_CHUNK, (window + 1) // ROWS * ROWS)


def backward_by_chunks(
    spec: Spec,
    queries: Queries,
    sinks: tuple[Float[Array, "B chunks K 64 H"], Float[Array, "B chunks K 64 Hv"]],
    starts: Int[Array, "B chunks"],
    sums: DqSums,
    others: Float32[Array, "B R0 N H"] | None,
    dquery_dtype: jnp.dtype,
    *,
    fetched: bool,
) -> tuple[
    Float[Array, "B T N H"],
    Float32[Array, "B chunks N sinks H"],
    Float32[Array, "B chunks N sinks Hv"],
]:
    """Finishes the gradients of queries; gradients of sinks by chunks and query heads.

    Args:
        spec: static settings.
        queries: queries of the shard, and what belongs to them.
        sinks: keys and values of the sinks of each chunk's sequence.
        starts: where this sequence starts.
        sums: gradients of queries through the keys in their windows.
        others: gradients of the first queries through keys of other launches, or None.
        dquery_dtype: of the gradients of queries.
        fetched: whether ``sinks`` holds those that stand before the shard.
    """
    config = _config(spec, queries, sinks, starts, sums, others, dquery_dtype, fetched=fetched)
    work, columns = config.work, config.columns
    parts = work.batch, config.num_chunks, work.heads, config.written_rows
    outputs = {
        "out": work.out_type,
        "dkey": jax.ShapeDtypeStruct((*parts, columns["dkey"]), jnp.float32),
        "dvalue": jax.ShapeDtypeStruct((*parts, columns["dvalue"]), jnp.float32),
    }

    def ring_swa_backward_sinks(refs):
        def body(*memory):
            SinkProgram(config, refs, *memory).run()

        pl.run_scoped(body, config.smem(), work.smem, config.barriers())

    results = launch(
        ring_swa_backward_sinks,
        config.operands(queries, sinks, starts),
        outputs,
        programs=work.batch * config.num_chunks * work.heads,
        varies_as=queries.query,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return results["out"], results["dkey"], results["dvalue"]


def _config(
    spec: Spec,
    queries: Queries,
    sinks: tuple[Float[Array, "B chunks K 64 H"], Float[Array, "B chunks K 64 Hv"]],
    starts: Int[Array, "B chunks"],
    sums: DqSums,
    others: Float32[Array, "B R0 N H"] | None,
    dquery_dtype: jnp.dtype,
    *,
    fetched: bool,
) -> SinkConfig:
    """What all programs have in common; arguments as of `backward_by_chunks`."""
    assert spec.window is not None
    _, length, heads, dim = queries.query.shape
    return SinkConfig(
        spec=spec,
        work=DqPostprocess(sums, others, scale=spec.scale, rows=length, dtype=dquery_dtype),
        group_size=heads // sinks[0].shape[2],
        num_chunks=starts.shape[1],
        chunk_tiles=chunk_length(spec.window) // ROWS,
        packed=queries.start.ndim > 0,
        fetched=fetched,
        dtype=queries.query.dtype,
        columns={"dkey": dim, "dvalue": sinks[1].shape[4]},
    )
