"""Fused backward kernel in Mosaic GPU, for Hopper and heads of up to 128: dq, dk and dv at once.

A program has a tile of keys, and goes through the queries that see them (`scheduler`). Each of its
two consumer warpgroups computes on half of the tile's keys, and keeps dk and dv of these keys in
registers. For dq, which sums over all keys of the tile, the consumers exchange the gradients of
logits through shared memory; each then computes half of the columns. `dq_accumulate` adds dq to
that of other programs.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32, Int

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward.dkv_reduce import reduce_parts_in_order
from pallas_kernels._mosaic_gpu.backward.dq_accumulate import SLOTS, accumulate_tiles
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqEpilogue, DqSums
from pallas_kernels._mosaic_gpu.backward.pipeline import BackwardPipeline, StepCopies
from pallas_kernels._mosaic_gpu.backward.scheduler import fold_steps, slot_of
from pallas_kernels._mosaic_gpu.backward.softmax import (
    initial_logits,
    softmax_backward,
    staging_columns,
    write_through_smem,
)
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE
from pallas_kernels._mosaic_gpu.primitives import (
    ROW,
    ROWS,
    broadcast_row,
    fence_async_smem,
    load_as,
    opaque_to_compiler,
    swizzled,
    zeros,
)
from pallas_kernels._spec import KeyRun, Spec

CONSUMERS = 2
"""Warpgroups that compute."""


KEY_TILE = CONSUMERS * ROWS
"""Keys of a tile."""


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
        dquery_dtype: of dquery, where the kernel is to scale and round it. It can if it is
            deterministic, ``rows`` is all queries and the run has the shard's own keys, and not
            without a window and documents.
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
        _Consumer(pipeline, refs, smem, barriers, warpgroup).run()

    def accumulate_dq(refs, smem, barriers):
        sums_smem, results_smem = _dquery_buffers(pipeline, smem)
        accumulate_tiles(pipeline, refs, sums_smem, results_smem, barriers)

    names = ("query", "dout", "shift", "delta", *pipeline.starts_and_flags)
    copies = {"query": StepCopies(names, SLOTS)}
    smem = _smem(pipeline, dim, value_dim, dkey_dtype) | pipeline.row_buffers(copies)
    dquery, dkey, dvalue = pipeline.launch(
        consume, accumulate_dq, copies, smem, _barriers(len(names)), dkey_dtype
    )
    return (DqSums(dquery, pipeline.seen) if epilogue is None else dquery), dkey, dvalue


def _smem(
    pipeline: BackwardPipeline, dim: int, value_dim: int, dkey_dtype: jnp.dtype
) -> dict[str, Any]:
    """Types of the buffers in shared memory, but for `BackwardPipeline.row_buffers`."""
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
        # The consumers, when they have written dquery; the accumulator.
        "dquery": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        # The accumulator, when a slot may be written; the consumers.
        "dquery_free": plgpu.Barrier(num_barriers=SLOTS),
    }


def _dquery_buffers(pipeline: BackwardPipeline, smem: dict[str, Any]) -> Sequence[Any]:
    """The buffers of sums and of results for queries, which are the same memory."""
    if pipeline.epilogue is None:
        return smem["dquery"], None
    sums_smem, results_smem = smem["dquery"]
    return sums_smem, results_smem


class _Consumer:
    """One of the two warpgroups that compute.

    Args:
        pipeline: the launch.
        refs: arrays in global memory.
        smem: buffers of `_smem`.
        barriers: those of `_barriers`.
        warpgroup: which of the two this is.
    """

    def __init__(
        self,
        pipeline: BackwardPipeline,
        refs: dict[str, Any],
        smem: dict[str, Any],
        barriers: dict[str, Any],
        warpgroup: Int[Array, ""],
    ):
        self.pipeline, self.spec = pipeline, pipeline.spec
        self.refs, self.smem, self.barriers, self.warpgroup = refs, smem, barriers, warpgroup
        # At first all shared memory is free.
        plgpu.barrier_arrive(barriers["dlogits_free"])
        for slot in range(SLOTS):
            plgpu.barrier_arrive(barriers["query_free"].at[slot])
        self.schedule = pipeline.program_schedule(refs)
        first_row = self.schedule.key_block * KEY_TILE + warpgroup * ROWS
        self.first_key = first_row + pipeline.run.offset
        self.key_bounds = pipeline.key_bounds(refs)
        self.dlogits_rows = pl.ds(warpgroup * ROWS, ROWS)
        self.sums_smem, self.results_smem = _dquery_buffers(pipeline, smem)
        self.half_dim = pipeline.dim // 2

    def run(self) -> None:
        """Runs all steps of the program, and writes dkey and dvalue."""
        dim, value_dim = self.pipeline.dim, self.pipeline.run.value.shape[3]
        plgpu.barrier_wait(self.barriers["key"])
        # The other consumer reads these keys only after this one has arrived on "dlogits".
        first_row = self.dlogits_rows.start
        self.pipeline.zero_padding_of_keys(self.refs, self.smem, self.schedule, first_row)
        dkey, dvalue = fold_steps(self.schedule, self._step, (zeros(dim), zeros(value_dim)))
        results = {"dkey": (dkey,), "dvalue": (dvalue,)}
        warpgroup = self.warpgroup
        reduce_parts_in_order(
            self.schedule, self.refs, warpgroup, warpgroup, results, self._write_dkey_and_dvalue
        )

    def _step(self, head, query_block, number, carry):
        """Adds what flows through one tile of queries to dkey and dvalue, the carry."""
        del head
        spec, smem, barriers = self.spec, self.smem, self.barriers
        unmasked = self.schedule.is_unmasked(query_block)
        slot = slot_of(number, SLOTS)
        plgpu.barrier_wait(barriers["query"].at[slot])
        slots = {"query": slot, "dout": slot}
        self.pipeline.zero_padding_of_queries(smem, slot, query_block, slots)
        query_smem, dout_smem = smem["query"].at[slot], smem["dout"].at[slot]
        key_rows = pl.ds(opaque_to_compiler(self.warpgroup) * ROWS, ROWS)
        shift = broadcast_row(load_as(smem["shift"].at[slot], ROW))
        minus_delta = broadcast_row(load_as(smem["delta"].at[slot], ROW))
        bounds = self.pipeline.query_bounds(smem, slot)
        mask = partial(self.pipeline.mask, bounds, self.first_key, self.key_bounds, query_block)

        def multiply(accumulators):
            dkey, dvalue, logits, dweights = accumulators
            plgpu.wgmma(logits, smem["key"].at[key_rows], query_smem.T)
            plgpu.wgmma(dweights, smem["value"].at[key_rows], dout_smem.T)
            weights, dlogits = softmax_backward(
                spec, logits, dweights, shift, unmasked, mask, dout_smem.dtype
            )
            plgpu.wgmma(dvalue, weights, dout_smem)
            self._exchange_dlogits(dlogits)
            accumulator = plgpu.ACC((QUERY_TILE, self.half_dim), jnp.float32)
            pl.run_scoped(
                partial(self._multiply_dlogits, slot, query_block, dlogits, dkey), accumulator
            )
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(barriers["query_free"].at[slot])

        initial = *carry, initial_logits(spec, shift), minus_delta
        return pl.run_state(multiply)(tuple(map(plgpu.ACC.init, initial)))[:2]

    def _exchange_dlogits(self, dlogits: Float[Array, "64 64"]) -> None:
        """Leaves the gradients of logits in shared memory, and waits for the other consumer's."""
        plgpu.barrier_wait(self.barriers["dlogits_free"])
        self.smem["dlogits"].at[self.dlogits_rows][...] = dlogits
        fence_async_smem()
        plgpu.barrier_arrive(self.barriers["dlogits"])
        plgpu.barrier_wait(self.barriers["dlogits"])

    def _multiply_dlogits(self, slot, query_block, dlogits, dkey, dquery) -> None:
        """Adds to the accumulators of dkey and of this warpgroup's half of the columns of dquery.

        Leaves the half in shared memory.
        """
        smem, barriers = self.smem, self.barriers
        columns = pl.ds(opaque_to_compiler(self.warpgroup) * self.half_dim, self.half_dim)
        plgpu.wgmma(dquery, smem["dlogits"].T, smem["key"].at[:, columns])
        plgpu.wgmma(dkey, dlogits, smem["query"].at[slot])
        # dquery is complete; dkey's product goes on.
        result = plgpu.wgmma_accumulator_load(dquery, wait_n=1)
        plgpu.barrier_arrive(barriers["dlogits_free"])
        plgpu.barrier_wait(barriers["dquery_free"].at[slot])
        self._leave_dquery(slot, query_block, result)
        plgpu.barrier_arrive(barriers["dquery"].at[slot])

    def _leave_dquery(self, slot, query_block, sums: Float32[Array, "64 columns"]) -> None:
        """Leaves sums for queries, or the results of the last program, in shared memory."""
        epilogue = self.pipeline.epilogue
        store = partial(register_tiles.store, self.sums_smem.at[slot, self.warpgroup], sums)
        if epilogue is None:
            store()
        else:
            store_results = partial(self._leave_results, epilogue, slot, query_block, sums)
            pl.when(self.schedule.adds_last(query_block))(store_results)
            pl.when(~self.schedule.adds_last(query_block))(store)
        fence_async_smem()

    def _leave_results(self, epilogue: DqEpilogue, slot, query_block, sums) -> None:
        """Adds the sums of other programs, which the accumulator has copied; scales and rounds."""
        others = self.sums_smem.at[slot, self.warpgroup]
        total = lax.cond(
            self.schedule.adders_before(query_block) > 0,
            lambda x: x + register_tiles.load(others, self.half_dim),
            lambda x: x,
            sums,
        )
        plgpu.commit_smem()  # waits until all warps have read what the results overwrite
        self.results_smem.at[slot, self.warpgroup, 0][...] = epilogue.scale_and_round(total)

    def _write_dkey_and_dvalue(self, results: Mapping[str, tuple[Array, ...]]) -> None:
        """Writes this warpgroup's rows of dkey and dvalue."""
        (dkey,), (dvalue,) = results["dkey"], results["dvalue"]
        schedule = self.schedule
        rows = pl.ds(schedule.key_block * KEY_TILE + self.warpgroup * ROWS, ROWS)
        for name, result in (("dvalue", dvalue), ("dkey", dkey * self.spec.scale)):

            def dst(column, columns, ref=self.refs[name]):
                return ref.at[schedule.row, rows, schedule.kv_head, pl.ds(column, columns)]

            write_through_smem(result, self.smem["out"].at[self.warpgroup], dst)
        plgpu.wait_smem_to_gmem(0)
