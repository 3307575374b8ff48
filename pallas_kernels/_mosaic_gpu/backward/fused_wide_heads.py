"""Fused backward kernel in Mosaic GPU, for Hopper and heads of 192 and 256: dq, dk and dv at once.

As `fused`, but dk fills the registers of a warpgroup, and so does dv: the two consumers have
different work (`fused_wide_heads_consumer`). Here are the launch and its shared memory.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward.dq_accumulate_slices import accumulate_slices
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqSums
from pallas_kernels._mosaic_gpu.backward.fused_wide_heads_consumer import (
    ACCUMULATOR_COLUMNS,
    DQUERY_COLUMNS,
    KEY_TILE,
    SLOTS,
    Consumer,
)
from pallas_kernels._mosaic_gpu.backward.pipeline import BackwardPipeline
from pallas_kernels._mosaic_gpu.backward.producer import StepCopies, row_buffers
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE
from pallas_kernels._mosaic_gpu.primitives import ROWS, swizzled
from pallas_kernels._spec import KeyRun, Spec


def dquery_columns(dim: int) -> int:
    """Columns of a slice of dq, for heads of this size."""
    del dim
    return DQUERY_COLUMNS


def takes(dim: int, value_dim: int) -> bool:
    """Whether the kernel is for heads of this size."""
    divides = dim % DQUERY_COLUMNS == 0 and value_dim % DQUERY_COLUMNS == 0
    return dim > ACCUMULATOR_COLUMNS and divides


def backward(
    spec: Spec,
    queries: Queries,
    run: KeyRun,
    *,
    rows: int,
    dkey_dtype: jnp.dtype,
    num_sms: int,
    deterministic: bool,
    sums: DqSums | None = None,
) -> tuple[DqSums, Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """As `pallas_kernels._mosaic_gpu.backward.fused.backward`."""
    dim, value_dim = queries.query.shape[3], run.value.shape[3]
    pipeline = BackwardPipeline(
        spec,
        queries,
        run,
        rows=rows,
        key_tile=KEY_TILE,
        columns=DQUERY_COLUMNS,
        num_sms=num_sms,
        deterministic=deterministic,
        sums=sums,
    )

    def consume(refs, smem, barriers, warpgroup):
        consumer = Consumer(pipeline, refs, smem, barriers, warpgroup)
        pl.when(warpgroup == 0)(consumer.run_values)
        pl.when(warpgroup == 1)(consumer.run_keys)

    def accumulate_dq(refs, smem, barriers):
        slices = [(n % 2, pl.ds(n, 1)) for n in range(dim // DQUERY_COLUMNS)]
        accumulate_slices(pipeline, refs, smem["dquery"], barriers, slices)

    copies = {
        "query": StepCopies(("query", "shift", *pipeline.starts_and_flags), SLOTS),
        "dout": StepCopies(("dout", "delta"), 1),
    }
    smem = _smem(pipeline, dim, value_dim, dkey_dtype) | row_buffers(copies)
    barriers = _barriers({barrier: len(arrays.names) for barrier, arrays in copies.items()})
    slices, dkey, dvalue = pipeline.launch(
        consume, accumulate_dq, copies, smem, barriers, dkey_dtype
    )
    return DqSums(slices, pipeline.seen), dkey, dvalue


def _smem(
    pipeline: BackwardPipeline, dim: int, value_dim: int, dkey_dtype: jnp.dtype
) -> dict[str, Any]:
    """Types of the buffers in shared memory, but for `row_buffers`."""
    dtype = pipeline.query.dtype
    return {
        "key": swizzled((KEY_TILE, dim), dtype, columns=DQUERY_COLUMNS),
        "value": swizzled((KEY_TILE, value_dim), dtype),
        "query": swizzled((SLOTS, QUERY_TILE, dim), dtype, columns=DQUERY_COLUMNS),
        "dout": swizzled((1, QUERY_TILE, value_dim), dtype),
        "factors": plgpu.SMEM(register_tiles.tile_shape(QUERY_TILE), jnp.float32),
        "dlogits": swizzled((KEY_TILE, QUERY_TILE), dtype, columns=DQUERY_COLUMNS),
        # A slice of each consumer.
        "dquery": plgpu.SMEM((2, 1, *pipeline.dquery_tile[1:]), jnp.float32),
        # Each consumer's staging buffer for dkey or dvalue.
        "out": swizzled((2, ROWS, 32 // jnp.dtype(dkey_dtype).itemsize), dkey_dtype),
    }


def _barriers(copies: dict[str, int]) -> dict[str, Any]:
    """Types of the barriers: who arrives, and who waits. ``copies`` are those of a step."""
    return {
        # The copies of keys and values; both consumers.
        "key": plgpu.Barrier(num_arrivals=2),
        # The copies of a step's queries; both consumers.
        "query": plgpu.Barrier(num_arrivals=copies["query"], num_barriers=SLOTS),
        # Both consumers, when they have read a slot; the producer.
        "query_free": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        # The copies of a step's gradients of outputs; both consumers.
        "dout": plgpu.Barrier(num_arrivals=copies["dout"], num_barriers=1),
        # Both consumers, when they have read these; the producer.
        "dout_free": plgpu.Barrier(num_arrivals=2, num_barriers=1),
        # The consumer of values, when it has written the factors; the consumer of keys.
        "factors": plgpu.Barrier(),
        # The consumer of keys, when it has read them; the consumer of values.
        "factors_free": plgpu.Barrier(),
        # The consumer of keys, when it has written dlogits; the consumer of values.
        "dlogits": plgpu.Barrier(),
        # Both consumers, when they have read them; the consumer of keys.
        "dlogits_free": plgpu.Barrier(num_arrivals=2),
        # The consumer whose slot it is, when it has written a slice; the dq accumulator.
        "dquery": plgpu.Barrier(num_barriers=2),
        # The dq accumulator, when it has copied the slice; this consumer.
        "dquery_free": plgpu.Barrier(num_barriers=2),
    }
