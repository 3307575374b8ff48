"""The dq accumulator of `fused_wide_heads`: slice by slice of a tile's columns."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._mosaic_gpu.backward.dq_accumulate import (
    adders_to_wait_for,
    signal_last_step,
    signals_others,
    store_or_add,
)
from pallas_kernels._mosaic_gpu.backward.pipeline import BackwardPipeline
from pallas_kernels._mosaic_gpu.backward.scheduler import fold_steps
from pallas_kernels._mosaic_gpu.primitives import Index, semaphore_signal_and_wait


def accumulate_slices(
    pipeline: BackwardPipeline,
    refs: dict[str, Any],
    buffers: Any,
    barriers: dict[str, Any],
    slices: list[tuple[int, Any]],
) -> None:
    """The dq accumulator, where consumers store a tile one slice of columns after the other.

    Args:
        pipeline: the launch.
        refs: arrays in global memory.
        buffers: slots in shared memory, each for one slice.
        barriers: on "dquery" a consumer arrives when it has filled a slot, on "dquery_free" the
            dq accumulator when that may be filled again.
        slices: slot, and index of the slice in a tile of sums, in the order in which they come.
    """
    _SliceAccumulator(pipeline, refs, buffers, barriers, slices).run()


class _SliceAccumulator:
    """What `accumulate_slices` runs; arguments as there."""

    def __init__(
        self,
        pipeline: BackwardPipeline,
        refs: dict[str, Any],
        buffers: Any,
        barriers: dict[str, Any],
        slices: list[tuple[int, Any]],
    ):
        self.pipeline, self.refs, self.barriers = pipeline, refs, barriers
        self.buffers, self.slices = buffers, slices
        self.program = pipeline.program_schedule(refs)
        self.adders = refs["adders"].at[self.program.row]

    def run(self) -> None:
        """Runs all steps of the program."""
        # At first all slots are free.
        for slot in range(self.buffers.shape[0]):
            plgpu.barrier_arrive(self.barriers["dquery_free"].at[slot])
        *tile, signals = fold_steps(self.program, self._step, (jnp.int32(0),) * 3)
        signal_last_step(self.adders.at[*tile], signals)

    def _step(
        self, head: Index, query_block: Index, number: Index, previous: tuple[Index, Index, Index]
    ) -> tuple[Index, Index, Index]:
        """Adds a tile; ``previous``: head, tile and `signals_others` of the step before."""
        del number
        before = adders_to_wait_for(self.pipeline, self.program, query_block)
        # Signals the step before this one, and waits until this one may add.
        *previous_tile, signals = previous
        semaphore_signal_and_wait(
            self.adders.at[*previous_tile], signals, self.adders.at[head, query_block], before
        )
        copied = None
        for slot, index in self.slices:
            plgpu.barrier_wait(self.barriers["dquery"].at[slot])
            dst = self.refs["dquery_sums"].at[self.program.row, head, query_block, index]
            store_or_add(self.pipeline, self.buffers.at[slot], dst, before)
            plgpu.commit_smem_to_gmem_group()
            if copied is not None:
                self._release(copied, 1)
            copied = slot
        assert copied is not None
        self._release(copied, 0)
        return head, query_block, signals_others(self.pipeline, before)

    def _release(self, slot: int, behind: int) -> None:
        """Releases a slot once all copies but so many later ones have read theirs."""
        plgpu.wait_smem_to_gmem(behind, wait_read_only=True)
        plgpu.barrier_arrive(self.barriers["dquery_free"].at[slot])
