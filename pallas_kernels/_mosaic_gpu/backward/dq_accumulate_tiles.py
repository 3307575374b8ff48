"""The dq accumulator of `fused`: whole tiles, and results where its program adds last."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool

from pallas_kernels._mosaic_gpu.backward.dq_accumulate import (
    adders_to_wait_for,
    signal_last_step,
    signals_others,
    store_or_add,
)
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqEpilogue
from pallas_kernels._mosaic_gpu.backward.pipeline import BackwardPipeline
from pallas_kernels._mosaic_gpu.backward.scheduler import slot_of
from pallas_kernels._mosaic_gpu.primitives import Index, fori, semaphore_signal_and_wait

SLOTS = 2
"""Tiles of gradients in shared memory, for `accumulate_tiles`."""


_State = tuple[Index, Index]
"""Where a program's schedule is: `ProgramSchedule`."""


_Added = tuple[Index, ...]
"""Head and tile of queries of a step, and its `signals_others`."""


def accumulate_tiles(
    pipeline: BackwardPipeline,
    refs: dict[str, Any],
    buffers: Any,
    results: Any,
    barriers: dict[str, Any],
) -> None:
    """The dq accumulator, where consumers store a whole tile in one of `SLOTS` slots.

    With an epilogue, in the program that adds last, the dq accumulator copies the sums of the other
    programs to the slot before the consumers fill it. These store the result in the same slot.

    Args:
        pipeline: the launch.
        refs: arrays in global memory.
        buffers: slots in shared memory, each for a tile of sums.
        results: with an epilogue, the same memory, each slot for a tile of results.
        barriers: on "dquery" both consumers arrive when they have filled a slot; on "dquery_free"
            the dq accumulator, or its copy of sums, when they may fill it.
    """
    _TileAccumulator(pipeline, refs, buffers, results, barriers).run()


class _TileAccumulator:
    """What `accumulate_tiles` runs; arguments as there."""

    def __init__(
        self,
        pipeline: BackwardPipeline,
        refs: dict[str, Any],
        buffers: Any,
        results: Any,
        barriers: dict[str, Any],
    ):
        self.pipeline, self.refs, self.barriers = pipeline, refs, barriers
        self.buffers, self.results = buffers, results
        self.epilogue: DqEpilogue | None = pipeline.epilogue
        # Whether a step is signalled when its copy has been written, so that the next program of
        # the same queries can follow closely; or one step later, when no wait for the copy is
        # needed as a rule. On an H100, forward and backward, signals at once took 2 to 4% off
        # layers without a window and 2% off a window of 1000. With 23 documents at that window
        # they added 16%.
        self.signals_at_once = not pipeline.packed
        self.program = pipeline.program_schedule(refs)
        self.adders = refs["adders"].at[self.program.row]

    def run(self) -> None:
        """Runs all steps of the program."""
        program, zero = self.program, jnp.int32(0)
        first = program.first_state
        second = program.next_state(*first)
        self._release(zero, first)
        self._release(zero + 1, second)
        self._signal_and_wait((zero, zero, zero), zero, first)
        self._release_with_sums(zero, first)
        *_, head, query_block, signals = fori(
            0, program.steps, self._step, (*first, zero, zero, zero)
        )
        if self.signals_at_once:
            plgpu.wait_smem_to_gmem(0)
        else:
            signal_last_step(self.adders.at[head, query_block], signals)

    def _step(self, number: Index, state: tuple[Index, ...]) -> tuple[Index, ...]:
        """Adds a tile; then prepares the next two steps.

        The state: that of the program's steps, then `_Added` of the step before this one.
        """
        program = self.program
        member, n, *previous = state
        head, query_block = program.coordinates(member, n)
        before = adders_to_wait_for(self.pipeline, program, query_block)
        slot = slot_of(number, SLOTS)
        plgpu.barrier_wait(self.barriers["dquery"].at[slot])
        if self.epilogue is None:
            self._add(slot, head, query_block, before)
        else:
            write = partial(self._write, self.epilogue, slot, head, query_block)
            add = partial(self._add, slot, head, query_block, before)
            pl.when(program.adds_last(query_block))(write)
            pl.when(~program.adds_last(query_block))(add)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        following = program.next_state(member, n)
        self._release(number + 2, program.next_state(*following))
        added = head, query_block, signals_others(self.pipeline, before)
        signalled = added if self.signals_at_once else tuple(previous)
        self._signal_and_wait(signalled, number + 1, following)
        self._release_with_sums(number + 1, following)
        return *following, *added

    def _add(
        self,
        slot: Index,
        head: Index,
        query_block: Index,
        before: Index,
    ) -> None:
        """Adds a tile to the sums."""
        dst = self.refs["dquery_sums"].at[self.program.row, head, query_block]
        store_or_add(self.pipeline, self.buffers.at[slot], dst, before)

    def _write(
        self,
        epilogue: DqEpilogue,
        slot: Index,
        head: Index,
        query_block: Index,
    ) -> None:
        """Writes a tile of results."""
        for n in range(epilogue.num_slices):
            dst = epilogue.dst(self.refs, self.program.row, query_block, head, n)
            plgpu.copy_smem_to_gmem(self.results.at[slot, n, 0], dst, commit_group=False)

    def _needs_sums(self, number: Index, query_block: Index) -> Bool[Array, ""]:
        """Whether a step makes the result from the sums of other programs."""
        program = self.program
        return (
            (number < program.steps)
            & program.adds_last(query_block)
            & (program.adders_before(query_block) > 0)
        )

    def _release(self, number: Index, state: _State) -> None:
        """Releases the slot of a step, unless that needs sums."""
        _, query_block = self.program.coordinates(*state)
        free = self.barriers["dquery_free"].at[slot_of(number, SLOTS)]
        if self.epilogue is None:
            plgpu.barrier_arrive(free)
        else:
            needs_sums = self._needs_sums(number, query_block)
            pl.when(~needs_sums)(lambda: plgpu.barrier_arrive(free))

    def _release_with_sums(self, number: Index, state: _State) -> None:
        """Copies sums to the slot of a step that needs them, whose arrival releases it."""
        head, query_block = self.program.coordinates(*state)
        if self.epilogue is None:
            return

        @pl.when(self._needs_sums(number, query_block))
        def copy():
            slot = slot_of(number, SLOTS)
            src = self.refs["dquery_sums"].at[self.program.row, head, query_block]
            free = self.barriers["dquery_free"].at[slot]
            plgpu.copy_gmem_to_smem(src, self.buffers.at[slot], free)

    def _signal_and_wait(self, added: _Added, number: Index, state: _State) -> None:
        """Signals what has been added, and waits until the step ``number``, if it exists, may."""
        head, query_block = self.program.coordinates(*state)
        exists = number < self.program.steps
        head, query_block = jnp.where(exists, head, 0), jnp.where(exists, query_block, 0)
        before = adders_to_wait_for(self.pipeline, self.program, query_block)
        before = jnp.where(exists, before, 0)
        *tile, signals = added
        semaphore_signal_and_wait(
            self.adders.at[*tile],
            signals,
            self.adders.at[head, query_block],
            before,
            behind=0 if self.signals_at_once else 1,
        )
