"""Fused backward kernel in Mosaic GPU, for Hopper and heads of up to 128: dq, dk and dv at once.

A program has a tile of keys, and goes through the queries that see them (`scheduler`). Two consumer
warpgroups compute (`fused_consumer`); `pipeline` has the other two. Here are the launch and its
shared memory.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu.backward.dq_accumulate_tiles import SLOTS, accumulate_tiles
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqEpilogue, DqSums
from pallas_kernels._mosaic_gpu.backward.fused_consumer import KEY_TILE, Consumer, dquery_buffers
from pallas_kernels._mosaic_gpu.backward.pipeline import CONSUMERS, BackwardPipeline
from pallas_kernels._mosaic_gpu.backward.producer import StepCopies, row_buffers
from pallas_kernels._mosaic_gpu.backward.softmax import staging_columns
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE
from pallas_kernels._mosaic_gpu.primitives import ROWS, swizzled
from pallas_kernels._spec import KeyRun, Spec


def dquery_columns(dim: int) -> int:
    """Columns of a slice of dq, for heads of this size."""
    return dim // 2


def backward(
    spec: Spec,
    queries: Queries,
    run: KeyRun,
    *,
    rows: int,
    dkey_dtype: jnp.dtype,
    num_sms: int,
    deterministic: bool,
    dquery_dtype: jnp.dtype | None = None,
    sums: DqSums | None = None,
) -> tuple[DqSums | Float[Array, "B R N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Gradients through the first ``rows`` queries and the keys of a run that windows reach.

    Args:
        spec: static settings.
        queries: queries of the shard, and what belongs to them.
        run: keys and values.
        rows: number of queries.
        dkey_dtype: of dkey and dvalue.
        num_sms: multiprocessors of the GPU.
        deterministic: whether the gradients of queries are added up in a fixed order.
        dquery_dtype: of dquery, if the kernel itself is to scale and round it. It can only do so in
            a fixed order, for all queries, where the run has the shard's own keys, and under a
            window or with documents.
        sums: of other launches, to which this one adds in place.

    Returns:
        dquery, or `DqSums` if ``dquery_dtype`` is None; dkey; dvalue.
    """
    dim, value_dim = queries.query.shape[3], run.value.shape[3]
    epilogue = None
    if dquery_dtype is not None:
        epilogue = DqEpilogue(
            scale=spec.scale,
            shape=queries.query.shape,
            columns=dquery_columns(dim),
            dtype=dquery_dtype,
        )
    pipeline = BackwardPipeline(
        spec,
        queries,
        run,
        rows=rows,
        key_tile=KEY_TILE,
        columns=dquery_columns(dim),
        num_sms=num_sms,
        deterministic=deterministic,
        epilogue=epilogue,
        sums=sums,
    )

    def consume(refs, smem, barriers, warpgroup):
        Consumer(pipeline, refs, smem, barriers, warpgroup).run()

    def accumulate_dq(refs, smem, barriers):
        sums_smem, results_smem = dquery_buffers(pipeline, smem)
        accumulate_tiles(pipeline, refs, sums_smem, results_smem, barriers)

    names = ("query", "dout", "shift", "delta", *pipeline.starts_and_flags)
    copies = {"query": StepCopies(names, SLOTS)}
    smem = _smem(pipeline, dim, value_dim, dkey_dtype) | row_buffers(copies)
    dquery, dkey, dvalue = pipeline.launch(
        consume, accumulate_dq, copies, smem, _barriers(len(names)), dkey_dtype
    )
    return (DqSums(dquery, pipeline.seen) if epilogue is None else dquery), dkey, dvalue


def _smem(
    pipeline: BackwardPipeline, dim: int, value_dim: int, dkey_dtype: jnp.dtype
) -> dict[str, Any]:
    """Types of the buffers in shared memory, but for `row_buffers`."""
    dtype, half_dim = pipeline.query.dtype, dim // 2
    smem = {
        "key": swizzled((KEY_TILE, dim), dtype, columns=half_dim),
        "value": swizzled((KEY_TILE, value_dim), dtype),
        "query": swizzled((SLOTS, QUERY_TILE, dim), dtype, columns=half_dim),
        "dout": swizzled((SLOTS, QUERY_TILE, value_dim), dtype),
        "dlogits": swizzled((KEY_TILE, QUERY_TILE), dtype, columns=half_dim),
        "dquery": plgpu.SMEM((SLOTS, *pipeline.dquery_tile), jnp.float32),
        # Each consumer's staging buffer for dkey and dvalue.
        "out": swizzled((CONSUMERS, ROWS, staging_columns(dkey_dtype, dim, value_dim)), dkey_dtype),
    }
    if pipeline.epilogue is not None:
        # A result has as many bytes as its sums, counting the unused ones, so that the result of
        # each slot and slice lies in the memory of its own sums.
        result_dtype = pipeline.epilogue.dtype
        unused = jnp.dtype(jnp.float32).itemsize // jnp.dtype(result_dtype).itemsize
        results = swizzled((SLOTS, 2, unused, ROWS, half_dim), result_dtype)
        smem["dquery"] = plgpu.RefUnion(smem["dquery"], results)
    return smem


def _barriers(copies: int) -> dict[str, Any]:
    """Types of the barriers: who arrives, and who waits. ``copies`` are those of a step."""
    return {
        # The copies of keys and values; the consumers.
        "key": plgpu.Barrier(num_arrivals=2),
        # All copies of a step; the consumers.
        "query": plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
        # The consumers, when they have read a slot; the producer.
        "query_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        # The consumers, when they have written dlogits; both of them.
        "dlogits": plgpu.Barrier(num_arrivals=CONSUMERS),
        # The consumers, when they have read dlogits; both of them.
        "dlogits_free": plgpu.Barrier(num_arrivals=CONSUMERS),
        # The consumers, when they have written dquery; the dq accumulator.
        "dquery": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        # The dq accumulator, when a slot may be written; the consumers.
        "dquery_free": plgpu.Barrier(num_barriers=SLOTS),
    }
