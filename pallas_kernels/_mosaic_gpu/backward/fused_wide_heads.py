"""Fused backward kernel in Mosaic GPU, for Hopper and heads of 192 and 256: dq, dk and dv at once.

As `fused`, but dk fills the registers of a warpgroup, and so does dv. So one consumer, of *values*,
computes the softmax and dv. It passes the factors of the gradients of logits (`softmax_weights`) to
the other one, of *keys*, through shared memory and in float32. The consumer of keys computes the
gradients of logits and dk. Both compute dq, in slices of columns that alternate between them.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward.dkv_reduce import MAX_COLUMNS, reduce_parts_in_order
from pallas_kernels._mosaic_gpu.backward.dq_accumulate import accumulate_slices
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqSums
from pallas_kernels._mosaic_gpu.backward.pipeline import BackwardPipeline, StepCopies
from pallas_kernels._mosaic_gpu.backward.scheduler import fold_steps, slot_of
from pallas_kernels._mosaic_gpu.backward.softmax import (
    initial_logits,
    softmax_weights,
    write_through_smem,
)
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE
from pallas_kernels._mosaic_gpu.primitives import (
    ROW,
    ROWS,
    broadcast_row,
    fence_async_smem,
    load_as,
    swizzled,
    zeros,
)
from pallas_kernels._spec import KeyRun, Spec

KEY_TILE = ROWS
"""Keys of a tile."""


DQUERY_COLUMNS = 64
"""Columns of a slice of dq."""


ACCUMULATOR_COLUMNS = MAX_COLUMNS
"""Columns of an accumulator of dk or dv at most: a product needs registers beside it."""


SLOTS = 2
"""Tiles of queries in shared memory. There is one of the gradients of outputs."""


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
        consumer = _Consumer(pipeline, refs, smem, barriers, warpgroup)
        pl.when(warpgroup == 0)(consumer.run_values)
        pl.when(warpgroup == 1)(consumer.run_keys)

    def accumulate_dq(refs, smem, barriers):
        slices = [(n % 2, pl.ds(n, 1)) for n in range(dim // DQUERY_COLUMNS)]
        accumulate_slices(pipeline, refs, smem["dquery"], barriers, slices)

    copies = {
        "query": StepCopies(("query", "shift", *pipeline.starts_and_flags), SLOTS),
        "dout": StepCopies(("dout", "delta"), 1),
    }
    smem = _smem(pipeline, dim, value_dim, dkey_dtype) | pipeline.row_buffers(copies)
    barriers = _barriers({barrier: len(arrays.names) for barrier, arrays in copies.items()})
    slices, dkey, dvalue = pipeline.launch(
        consume, accumulate_dq, copies, smem, barriers, dkey_dtype
    )
    return DqSums(slices, pipeline.seen), dkey, dvalue


def _smem(
    pipeline: BackwardPipeline, dim: int, value_dim: int, dkey_dtype: jnp.dtype
) -> dict[str, Any]:
    """Types of the buffers in shared memory, but for `BackwardPipeline.row_buffers`."""
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
        # The consumer whose slot it is, when it has written a slice; the accumulator.
        "dquery": plgpu.Barrier(num_barriers=2),
        # The accumulator, when it has copied the slice; this consumer.
        "dquery_free": plgpu.Barrier(num_barriers=2),
    }


class _Consumer:
    """A warpgroup that computes: `run_values` is what the first one runs, `run_keys` the second.

    Args:
        pipeline: the launch.
        refs: arrays in global memory.
        smem: buffers of `_smem`.
        barriers: those of `_barriers`.
        warpgroup: which of the two this is.
    """

    def __init__(self, pipeline, refs, smem, barriers, warpgroup):
        self.pipeline, self.spec, self.dtype = pipeline, pipeline.spec, pipeline.query.dtype
        self.refs, self.smem, self.barriers, self.warpgroup = refs, smem, barriers, warpgroup
        self.schedule = pipeline.program_schedule(refs)
        self.key_bounds = pipeline.key_bounds(refs)
        # At first all shared memory is free.
        plgpu.barrier_arrive(barriers["dlogits_free"])
        plgpu.barrier_arrive(barriers["dout_free"].at[0])
        for slot in range(SLOTS):
            plgpu.barrier_arrive(barriers["query_free"].at[slot])

    def run_values(self) -> None:
        """Computes weights, dvalue, and every other slice of dquery."""
        first_key = self.schedule.key_block * KEY_TILE + self.pipeline.run.offset
        plgpu.barrier_wait(self.barriers["key"])
        self.pipeline.zero_padding_of_keys(self.refs, self.smem, self.schedule)
        dim = self.pipeline.run.value.shape[3]
        step = partial(self._values_step, first_key)
        self._write("dvalue", fold_steps(self.schedule, step, _zeros(dim)), 1.0)

    def run_keys(self) -> None:
        """Computes the gradients of logits, dkey, and the other slices of dquery."""
        plgpu.barrier_arrive(self.barriers["factors_free"])
        plgpu.barrier_wait(self.barriers["key"])
        self.pipeline.zero_padding_of_keys(self.refs, self.smem, self.schedule)
        dkeys = fold_steps(self.schedule, self._keys_step, _zeros(self.pipeline.dim))
        self._write("dkey", dkeys, self.spec.scale)

    def _values_step(self, first_key, head, query_block, number, dvalues):
        """Adds what flows through one tile of queries to dvalue, the carry."""
        del head
        spec, smem, barriers = self.spec, self.smem, self.barriers
        unmasked = self.schedule.is_unmasked(query_block)
        slot = slot_of(number, SLOTS)
        plgpu.barrier_wait(barriers["query"].at[slot])
        self.pipeline.zero_padding_of_queries(smem, slot, query_block, {"query": slot})
        shift = broadcast_row(load_as(smem["shift"].at[slot], ROW))
        bounds = self.pipeline.query_bounds(smem, slot)

        def multiply(accumulators):
            *dvalues, logits = accumulators
            plgpu.wgmma(logits, smem["key"], smem["query"].at[slot].T)
            mask = partial(self.pipeline.mask, bounds, first_key, self.key_bounds, query_block)
            products = plgpu.wgmma_accumulator_load(logits)
            weights, factors = softmax_weights(spec, products, shift, unmasked, mask)
            plgpu.barrier_arrive(barriers["query_free"].at[slot])
            plgpu.barrier_wait(barriers["factors_free"])
            register_tiles.store(smem["factors"], factors)
            plgpu.barrier_arrive(barriers["factors"])
            plgpu.barrier_wait(barriers["dout"].at[0])
            self.pipeline.zero_padding_of_queries(smem, slot, query_block, {"dout": 0})
            _multiply_add(dvalues, weights.astype(self.dtype), smem["dout"].at[0])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(barriers["dout_free"].at[0])

        initial = *dvalues, initial_logits(spec, shift)
        *dvalues, _ = pl.run_state(multiply)(tuple(map(plgpu.ACC.init, initial)))
        plgpu.barrier_wait(barriers["dlogits"])
        self._leave_dquery(0)
        return tuple(dvalues)

    def _keys_step(self, head, query_block, number, dkeys):
        """Adds what flows through one tile of queries to dkey, the carry."""
        del head
        smem, barriers = self.smem, self.barriers
        slot = slot_of(number, SLOTS)
        if self.pipeline.packed:  # the flag of padding comes with the queries
            plgpu.barrier_wait(barriers["query"].at[slot])
        plgpu.barrier_wait(barriers["dout"].at[0])
        slots = {"query": slot, "dout": 0}
        self.pipeline.zero_padding_of_queries(smem, slot, query_block, slots)
        minus_delta = broadcast_row(load_as(smem["delta"].at[0], ROW))

        def multiply(accumulators):
            *dkeys, dweights = accumulators
            plgpu.wgmma(dweights, smem["value"], smem["dout"].at[0].T)
            products = plgpu.wgmma_accumulator_load(dweights)
            plgpu.barrier_arrive(barriers["dout_free"].at[0])
            plgpu.barrier_wait(barriers["factors"])
            factors = register_tiles.load(smem["factors"], QUERY_TILE)
            dlogits = (factors * products).astype(self.dtype)
            plgpu.barrier_arrive(barriers["factors_free"])
            plgpu.barrier_wait(barriers["dlogits_free"])
            smem["dlogits"][...] = dlogits
            plgpu.commit_smem()
            plgpu.barrier_arrive(barriers["dlogits"])
            if not self.pipeline.packed:
                plgpu.barrier_wait(barriers["query"].at[slot])
            _multiply_add(dkeys, dlogits, smem["query"].at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(barriers["query_free"].at[slot])

        initial = *dkeys, minus_delta
        *dkeys, _ = pl.run_state(multiply)(tuple(map(plgpu.ACC.init, initial)))
        self._leave_dquery(1)
        return tuple(dkeys)

    def _leave_dquery(self, first: int) -> None:
        """Computes every other slice of dquery, from ``first`` on, and leaves it in SMEM."""
        smem, barriers = self.smem, self.barriers
        slices = self.pipeline.dim // DQUERY_COLUMNS

        def multiply(n, dquery):
            columns = pl.ds(n * DQUERY_COLUMNS, DQUERY_COLUMNS)
            plgpu.wgmma(dquery, smem["dlogits"].T, smem["key"].at[:, columns])
            result = plgpu.wgmma_accumulator_load(dquery)
            if n + 2 >= slices:  # this warpgroup's last one
                plgpu.barrier_arrive(barriers["dlogits_free"])
            plgpu.barrier_wait(barriers["dquery_free"].at[first])
            register_tiles.store(smem["dquery"].at[first, 0], result)
            fence_async_smem()
            plgpu.barrier_arrive(barriers["dquery"].at[first])

        for n in range(first, slices, 2):
            accumulator = plgpu.ACC((QUERY_TILE, DQUERY_COLUMNS), jnp.float32)
            pl.run_scoped(partial(multiply, n), accumulator)

    def _write(self, name: str, results: tuple[Float32[Array, "64 _"], ...], scale: float) -> None:
        """Writes dkey or dvalue, which is ``scale`` times the results side by side."""
        schedule = self.schedule

        def write(results):
            for n, result in enumerate(results[name]):

                def dst(column, columns, first=n * ACCUMULATOR_COLUMNS):
                    rows = pl.ds(schedule.key_block * KEY_TILE, KEY_TILE)
                    columns = pl.ds(first + column, columns)
                    return self.refs[name].at[schedule.row, rows, schedule.kv_head, columns]

                write_through_smem(result * scale, self.smem["out"].at[self.warpgroup], dst)
            plgpu.wait_smem_to_gmem(0)

        reduce_parts_in_order(schedule, self.refs, self.warpgroup, 0, {name: results}, write)


def _zeros(dim: int) -> tuple[Float32[Array, "64 _"], ...]:
    """Accumulators for so many columns."""
    return tuple(
        zeros(min(ACCUMULATOR_COLUMNS, dim - first)) for first in range(0, dim, ACCUMULATOR_COLUMNS)
    )


def _multiply_add(accumulators: list[Any], left: Float[Array, "64 keys"], right: Any) -> None:
    """Adds ``left @ right`` to accumulators that lie side by side."""
    for n, accumulator in enumerate(accumulators):
        columns = pl.ds(n * ACCUMULATOR_COLUMNS, accumulator.shape[1])
        plgpu.wgmma(accumulator, left, right.at[:, columns])
