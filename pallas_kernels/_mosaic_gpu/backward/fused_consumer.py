"""A consumer warpgroup of `fused`: it computes on half of the keys of its program's tile.

At each step it multiplies its keys and values with a tile of queries and of the gradients of
outputs, and adds to dk and dv of its keys, which are in registers. For dq, which sums over the keys
of both consumers, these exchange the gradients of logits through shared memory; then each computes
half of dq's columns, and stores it in shared memory for the dq accumulator (`dq_accumulate`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32

from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward.dkv_reduce import reduce_parts_in_order
from pallas_kernels._mosaic_gpu.backward.dq_accumulate_tiles import SLOTS
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqEpilogue
from pallas_kernels._mosaic_gpu.backward.pipeline import CONSUMERS, BackwardPipeline
from pallas_kernels._mosaic_gpu.backward.scheduler import fold_steps, slot_of
from pallas_kernels._mosaic_gpu.backward.softmax import (
    initial_logits,
    softmax_backward,
    write_through_smem,
)
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE
from pallas_kernels._mosaic_gpu.primitives import (
    ROW,
    ROWS,
    Index,
    broadcast_row,
    fence_async_smem,
    load_as,
    opaque_to_compiler,
    zeros,
)

KEY_TILE = CONSUMERS * ROWS
"""Keys of a tile: each consumer has the rows of one matrix."""


_Sums = tuple[Float32[Array, "64 H"], Float32[Array, "64 Hv"]]
"""dkey, before the scale, and dvalue of a consumer's keys."""


def dquery_buffers(pipeline: BackwardPipeline, smem: dict[str, Any]) -> Sequence[Any]:
    """The buffers of dquery: sums, and with an epilogue results, in the same memory."""
    if pipeline.epilogue is None:
        return smem["dquery"], None
    sums_smem, results_smem = smem["dquery"]
    return sums_smem, results_smem


class Consumer:
    """One of the two warpgroups that compute; they run the same code.

    Args:
        pipeline: the launch.
        refs: arrays in global memory.
        smem: the buffers of `fused`.
        barriers: its barriers.
        warpgroup: which of the two this is.
    """

    def __init__(
        self,
        pipeline: BackwardPipeline,
        refs: dict[str, Any],
        smem: dict[str, Any],
        barriers: dict[str, Any],
        warpgroup: Index,
    ):
        self.pipeline, self.spec, self.masks = pipeline, pipeline.spec, pipeline.masks
        self.refs, self.smem, self.barriers, self.warpgroup = refs, smem, barriers, warpgroup
        # At first all shared memory is free; the dq accumulator says so of "dquery_free".
        plgpu.barrier_arrive(barriers["dlogits_free"])
        for slot in range(SLOTS):
            plgpu.barrier_arrive(barriers["query_free"].at[slot])
        self.program = pipeline.program_schedule(refs)
        first_row = self.program.key_block * KEY_TILE + warpgroup * ROWS
        self.first_key = first_row + pipeline.run.offset
        self.key_bounds = pipeline.masks.key_bounds(refs)
        self.dlogits_rows = pl.ds(warpgroup * ROWS, ROWS)
        self.sums_smem, self.results_smem = dquery_buffers(pipeline, smem)
        self.half_dim = pipeline.dim // 2

    def run(self) -> None:
        """Runs all steps of the program, and writes dkey and dvalue."""
        dim, value_dim = self.pipeline.dim, self.pipeline.run.value.shape[3]
        plgpu.barrier_wait(self.barriers["key"])
        # The other consumer reads these keys only after this one has arrived on "dlogits".
        first_row = self.dlogits_rows.start
        self.masks.zero_padding_of_keys(self.refs, self.smem, self.program, first_row)
        dkey, dvalue = fold_steps(self.program, self._step, (zeros(dim), zeros(value_dim)))
        results = {"dkey": (dkey,), "dvalue": (dvalue,)}
        warpgroup = self.warpgroup
        reduce_parts_in_order(
            self.program, self.refs, warpgroup, warpgroup, results, self._write_dkey_and_dvalue
        )

    def _step(
        self,
        head: Index,
        query_block: Index,
        number: Index,
        carry: _Sums,
    ) -> _Sums:
        """Adds what flows through one tile of queries to dkey and dvalue, the carry."""
        del head
        spec, smem, barriers = self.spec, self.smem, self.barriers
        unmasked = self.program.is_unmasked(query_block)
        slot = slot_of(number, SLOTS)
        # Until the producer's copies for this step have arrived.
        plgpu.barrier_wait(barriers["query"].at[slot])
        slots = {"query": slot, "dout": slot}
        self.masks.zero_padding_of_queries(smem, slot, query_block, slots)
        query_smem, dout_smem = smem["query"].at[slot], smem["dout"].at[slot]
        key_rows = pl.ds(opaque_to_compiler(self.warpgroup) * ROWS, ROWS)
        shift = broadcast_row(load_as(smem["shift"].at[slot], ROW))
        minus_delta = broadcast_row(load_as(smem["delta"].at[slot], ROW))
        bounds = self.masks.query_bounds(smem, slot)
        mask = partial(self.masks.apply, bounds, self.first_key, self.key_bounds, query_block)

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
        """Stores the gradients of logits in shared memory, and waits for the other consumer's."""
        # Until both consumers have read those of the step before.
        plgpu.barrier_wait(self.barriers["dlogits_free"])
        self.smem["dlogits"].at[self.dlogits_rows][...] = dlogits
        fence_async_smem()
        plgpu.barrier_arrive(self.barriers["dlogits"])
        # Until both consumers have stored theirs.
        plgpu.barrier_wait(self.barriers["dlogits"])

    def _multiply_dlogits(
        self,
        slot: Index,
        query_block: Index,
        dlogits: Float[Array, "64 64"],
        dkey: Any,
        dquery: Any,
    ) -> None:
        """Adds to the accumulator of dkey; computes this warpgroup's half of dquery's columns.

        Stores the half in shared memory, for the dq accumulator.
        """
        smem, barriers = self.smem, self.barriers
        columns = pl.ds(opaque_to_compiler(self.warpgroup) * self.half_dim, self.half_dim)
        plgpu.wgmma(dquery, smem["dlogits"].T, smem["key"].at[:, columns])
        plgpu.wgmma(dkey, dlogits, smem["query"].at[slot])
        # dquery is complete; dkey's product goes on.
        result = plgpu.wgmma_accumulator_load(dquery, wait_n=1)
        plgpu.barrier_arrive(barriers["dlogits_free"])
        # Until the dq accumulator has copied what the slot held.
        plgpu.barrier_wait(barriers["dquery_free"].at[slot])
        self._store_dquery(slot, query_block, result)
        plgpu.barrier_arrive(barriers["dquery"].at[slot])

    def _store_dquery(
        self, slot: Index, query_block: Index, sums: Float32[Array, "64 columns"]
    ) -> None:
        """Stores sums for queries in shared memory; results, if this program adds last."""
        epilogue = self.pipeline.epilogue
        store = partial(register_tiles.store, self.sums_smem.at[slot, self.warpgroup], sums)
        if epilogue is None:
            store()
        else:
            store_results = partial(self._store_results, epilogue, slot, query_block, sums)
            pl.when(self.program.adds_last(query_block))(store_results)
            pl.when(~self.program.adds_last(query_block))(store)
        fence_async_smem()

    def _store_results(
        self,
        epilogue: DqEpilogue,
        slot: Index,
        query_block: Index,
        sums: Float32[Array, "64 columns"],
    ) -> None:
        """Adds the sums of other programs, which the dq accumulator has copied; scales, rounds."""
        others = self.sums_smem.at[slot, self.warpgroup]
        total = lax.cond(
            self.program.adders_before(query_block) > 0,
            lambda x: x + register_tiles.load(others, self.half_dim),
            lambda x: x,
            sums,
        )
        plgpu.commit_smem()  # waits until all warps have read what the results overwrite
        self.results_smem.at[slot, self.warpgroup, 0][...] = epilogue.scale_and_round(total)

    def _write_dkey_and_dvalue(self, results: Mapping[str, tuple[Array, ...]]) -> None:
        """Writes this warpgroup's rows of dkey and dvalue."""
        (dkey,), (dvalue,) = results["dkey"], results["dvalue"]
        program = self.program
        rows = pl.ds(program.key_block * KEY_TILE + self.warpgroup * ROWS, ROWS)
        for name, result in (("dvalue", dvalue), ("dkey", dkey * self.spec.scale)):

            def dst(column, columns, ref=self.refs[name]):
                return ref.at[program.row, rows, program.kv_head, pl.ds(column, columns)]

            write_through_smem(result, self.smem["out"].at[self.warpgroup], dst)
        plgpu.wait_smem_to_gmem(0)
