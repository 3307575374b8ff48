"""Backward kernel in Mosaic GPU, for Hopper and short windows: dq, dk and dv, each stored once.

A program goes through a chunk of the sequence, for one head of keys (`short_windows_schedule`).
Three consumer warpgroups compute, each with one of the three tiles of keys that a tile of queries
may see (`short_windows_consumer`). The fourth warpgroup copies, and computes dq and delta
(`short_windows_dq`). Nothing is added up in global memory, so results repeat their bits. Here are
the launch and its shared memory.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32

from pallas_kernels._kernels import BackwardInputs
from pallas_kernels._logits import LOWEST
from pallas_kernels._mosaic_gpu.backward.launch import WARPGROUPS_APART, launch
from pallas_kernels._mosaic_gpu.backward.short_windows_consumer import SUBTILE, Consumer
from pallas_kernels._mosaic_gpu.backward.short_windows_dq import DqProducer, step_arrays
from pallas_kernels._mosaic_gpu.backward.short_windows_schedule import (
    CONSUMERS,
    KEY_SLOTS,
    SLOTS,
    TILE,
    ShortSchedule,
    chunk_tiles,
    tiles_before_queries,
)
from pallas_kernels._mosaic_gpu.backward.softmax import shift_of, staging_columns
from pallas_kernels._mosaic_gpu.padding import FLAG_WIDTH, padding_flags
from pallas_kernels._mosaic_gpu.primitives import swizzled
from pallas_kernels._spec import Spec

CONSUMER_REGISTERS, PRODUCER_REGISTERS = 144, 80
"""Of a thread. A multiprocessor has 512 for each thread of a warpgroup: 3 * 144 + 80."""


def backward(
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float32[Array, "B R0 N H"] | None,
    *,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
    num_sms: int,
) -> tuple[
    Float[Array, "B T N H"],
    Float[Array, "B S K H"],
    Float[Array, "B S K Hv"],
    Float32[Array, "B N T"],
]:
    """Gradients through the keys of a run that `reaches` says windows are short enough for.

    Args:
        spec: static settings.
        inputs: the arrays; one run of keys.
        dquery: gradients of the first queries through keys of other launches, or None.
        dquery_dtype: of dquery.
        dkey_dtype: of dkey and dvalue.
        num_sms: multiprocessors of the GPU.

    Returns:
        dquery, with what is given added; dkey; dvalue; delta.
    """
    query, (run,) = inputs.query, inputs.runs
    batch, length, heads, _ = query.shape
    padded_length = pl.cdiv(length, TILE) * TILE
    schedule = _schedule(inputs, num_sms)
    operands, tiles_of_others = _operands(spec, inputs, dquery)
    outputs = {
        "dquery": jax.ShapeDtypeStruct(query.shape, dquery_dtype),
        "dkey": jax.ShapeDtypeStruct(run.key.shape, dkey_dtype),
        "dvalue": jax.ShapeDtypeStruct(run.value.shape, dkey_dtype),
        "minus_delta": jax.ShapeDtypeStruct((batch, heads, padded_length), jnp.float32),
    }
    smem, barriers = _smem(schedule, inputs, dquery_dtype, dkey_dtype), _barriers(schedule)

    def ring_swa_backward_short(refs):
        body = partial(_program, spec, schedule, tiles_of_others, refs)
        pl.run_scoped(body, smem, barriers, collective_axes="warpgroup")

    results = launch(
        ring_swa_backward_short,
        operands,
        outputs,
        programs=schedule.programs,
        varies_as=query,
        compiler_params=WARPGROUPS_APART,
        warpgroups=CONSUMERS + 1,
    )
    delta = -results["minus_delta"][..., :length]
    return results["dquery"], results["dkey"], results["dvalue"], delta


def _schedule(inputs: BackwardInputs, num_sms: int) -> ShortSchedule:
    """What all programs of the launch have in common."""
    (run,), (batch, length, heads, _) = inputs.runs, inputs.query.shape
    _, num_keys, num_kv_heads, _ = run.value.shape
    num_tiles = pl.cdiv(length, TILE) + tiles_before_queries(run.offset)
    return ShortSchedule(
        num_kv_heads=num_kv_heads,
        group_size=heads // num_kv_heads,
        batch_kv_heads=num_kv_heads * batch,
        num_tiles=num_tiles,
        chunk=chunk_tiles(num_tiles, num_kv_heads * batch, num_sms),
        packed=inputs.start.ndim > 0,
        has_ends=inputs.end is not None and inputs.end.ndim > 0,
        num_keys=num_keys,
        offset=run.offset,
    )


def _program(
    spec: Spec,
    schedule: ShortSchedule,
    tiles_of_others: int,
    refs: dict[str, Any],
    smem: dict[str, Any],
    barriers: dict[str, Any],
) -> None:
    """A program: its consumers, and the producer, which also computes dq."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def consumers():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        Consumer(spec, schedule, refs, smem, barriers, warpgroup).run()

    @pl.when(warpgroup == CONSUMERS)
    def producer():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        DqProducer(spec, schedule, tiles_of_others, refs, smem, barriers).run()


def _operands(
    spec: Spec, inputs: BackwardInputs, others: Float32[Array, "B R0 N H"] | None
) -> tuple[dict[str, Array], int]:
    """The arrays that the kernel reads, and how many tiles of queries ``others`` has."""
    query, (run,), start = inputs.query, inputs.runs, inputs.start
    out, dout, lse = inputs.out, inputs.dout, inputs.lse
    assert out is not None
    pad = -query.shape[1] % TILE
    shift = shift_of(spec, lse)
    operands = {
        "query": query,
        "dout": dout,
        "out": out,
        "shift": jnp.pad(shift, ((0, 0), (0, 0), (0, pad)), constant_values=LOWEST),
        "key": run.key,
        "value": run.value,
    }
    if start.ndim:
        operands["start"] = jnp.pad(start, ((0, 0), (0, pad)), mode="edge")
        operands["padding"] = padding_flags(start, spec.first_key)
    if inputs.end is not None and inputs.end.ndim:
        operands["end"] = jnp.pad(inputs.end, ((0, 0), (0, pad)), mode="edge")
    tiles_of_others = 0
    if others is not None:
        tiles_of_others = pl.cdiv(others.shape[1], TILE)
        missing = tiles_of_others * TILE - others.shape[1]
        operands["others"] = jnp.pad(others, ((0, 0), (0, missing), (0, 0), (0, 0)))
    return operands, tiles_of_others


def _smem(
    schedule: ShortSchedule,
    inputs: BackwardInputs,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
) -> dict[str, Any]:
    """Types of the buffers in shared memory."""
    dtype, dim = inputs.query.dtype, inputs.query.shape[3]
    value_dim = inputs.dout.shape[3]
    staging = staging_columns(dkey_dtype, dim, value_dim)
    smem = {
        "key": swizzled((KEY_SLOTS, TILE, dim), dtype, columns=SUBTILE),
        "value": swizzled((KEY_SLOTS, TILE, value_dim), dtype, columns=SUBTILE),
        "query": swizzled((SLOTS, TILE, dim), dtype, columns=SUBTILE),
        "dout": swizzled((SLOTS, TILE, value_dim), dtype, columns=SUBTILE),
        "out": swizzled((SLOTS, TILE, value_dim), dtype),
        "shift": plgpu.SMEM((SLOTS, TILE), jnp.float32),
        "delta": plgpu.SMEM((SLOTS, TILE), jnp.float32),
        # Two buffers: the consumers fill one while the producer reads the other.
        "dlogits": swizzled((2, CONSUMERS, TILE, TILE), dtype, columns=SUBTILE),
        "dquery": swizzled((TILE, dim), dquery_dtype),
        "dkeys": swizzled((CONSUMERS, TILE, staging), dkey_dtype),
    }
    if schedule.packed:
        smem["start"] = plgpu.SMEM((SLOTS, TILE), jnp.int32)
        smem["padding"] = plgpu.SMEM((SLOTS, FLAG_WIDTH), jnp.int32)
    if schedule.has_ends:
        smem["end"] = plgpu.SMEM((SLOTS, TILE), jnp.int32)
    return smem


def _barriers(schedule: ShortSchedule) -> dict[str, Any]:
    """Types of the barriers: who arrives, and who waits."""
    copies = len(step_arrays(schedule))
    return {
        # The copies of a consumer's keys and values; this consumer and the producer.
        "key": plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
        # The copies of a step's queries; the consumers and the producer.
        "query": plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
        # The consumers, when they have read a slot; the producer.
        "query_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        # The producer, when it has written delta; the consumers.
        "delta": plgpu.Barrier(num_barriers=SLOTS),
        # The consumers, when they have filled a buffer; the producer.
        "dlogits": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=2),
        # The producer, when it has read the buffer; the consumers.
        "dlogits_free": plgpu.Barrier(num_barriers=2),
    }
