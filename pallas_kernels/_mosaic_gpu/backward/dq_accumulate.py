"""How the programs of the fused Mosaic GPU backward kernels add up the gradients of queries.

The consumers of a program store a tile's gradients in shared memory. A warpgroup of its own, the dq
accumulator, adds them to the sums in global memory by TMA, in float32.

Each tile of queries has a semaphore: how many programs have added to its sums. In the deterministic
kernels a program waits until all programs that come before it have added, so that results repeat
their bits. In the others it only waits until the first one has stored, as all others add to that.

In a fixed order a program knows whether it adds last. It can then make the result from the sums
itself (`DqEpilogue`), so that no other kernel has to read them again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool

from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqEpilogue
from pallas_kernels._mosaic_gpu.backward.pipeline import BackwardPipeline
from pallas_kernels._mosaic_gpu.backward.scheduler import ProgramSchedule, fold_steps, slot_of
from pallas_kernels._mosaic_gpu.primitives import Index, fori, semaphore_signal_and_wait

SLOTS = 2
"""Tiles of gradients in shared memory, for `accumulate_tiles`."""


_State = tuple[Index, Index]
"""Where a program's schedule is: `ProgramSchedule`."""


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
    schedule = pipeline.program_schedule(refs)
    adders = refs["adders"].at[schedule.row]
    # At first all slots are free.
    for slot in range(buffers.shape[0]):
        plgpu.barrier_arrive(barriers["dquery_free"].at[slot])

    def step(head, query_block, number, previous):
        del number
        before = adders_to_wait_for(pipeline, schedule, query_block)
        # Signals the step before this one, and waits until this one may add.
        *previous_tile, signals = previous
        semaphore_signal_and_wait(
            adders.at[*previous_tile], signals, adders.at[head, query_block], before
        )

        def release(slot, behind):
            """Releases a slot once all copies but so many later ones have read theirs."""
            plgpu.wait_smem_to_gmem(behind, wait_read_only=True)
            plgpu.barrier_arrive(barriers["dquery_free"].at[slot])

        copied = None
        for slot, index in slices:
            plgpu.barrier_wait(barriers["dquery"].at[slot])
            dst = refs["dquery_sums"].at[schedule.row, head, query_block, index]
            store_or_add(pipeline, buffers.at[slot], dst, before)
            plgpu.commit_smem_to_gmem_group()
            if copied is not None:
                release(copied, 1)
            copied = slot
        release(copied, 0)
        return head, query_block, signals_others(pipeline, before)

    *tile, signals = fold_steps(schedule, step, (jnp.int32(0),) * 3)
    signal_last_step(adders.at[*tile], signals)


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
        self.schedule = pipeline.program_schedule(refs)
        self.adders = refs["adders"].at[self.schedule.row]

    def run(self) -> None:
        """Runs all steps of the program."""
        schedule, zero = self.schedule, jnp.int32(0)
        first = schedule.first_state
        second = schedule.next_state(*first)
        self._release(zero, first)
        self._release(zero + 1, second)
        self._wait_turn(zero, first, (zero, zero), zero)
        self._release_with_sums(zero, first)
        *_, head, query_block, signals = fori(
            0, schedule.steps, self._step, (*first, zero, zero, zero)
        )
        signal_last_step(self.adders.at[head, query_block], signals)

    def _step(self, number: Index, state: tuple[Index, ...]) -> tuple[Index, ...]:
        """Adds a tile; then prepares the next two steps.

        The state: that of the schedule, then head, tile of queries and `signals_others` of the
        step before this one.
        """
        schedule = self.schedule
        member, n, *previous_tile, signals = state
        head, query_block = schedule.coordinates(member, n)
        before = adders_to_wait_for(self.pipeline, schedule, query_block)
        slot = slot_of(number, SLOTS)
        plgpu.barrier_wait(self.barriers["dquery"].at[slot])
        if self.epilogue is None:
            self._add(slot, head, query_block, before)
        else:
            write = partial(self._write, self.epilogue, slot, head, query_block)
            add = partial(self._add, slot, head, query_block, before)
            pl.when(schedule.adds_last(query_block))(write)
            pl.when(~schedule.adds_last(query_block))(add)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        following = schedule.next_state(member, n)
        self._release(number + 2, schedule.next_state(*following))
        self._wait_turn(number + 1, following, previous_tile, signals)
        self._release_with_sums(number + 1, following)
        return *following, head, query_block, signals_others(self.pipeline, before)

    def _add(
        self,
        slot: Index,
        head: Index,
        query_block: Index,
        before: Index,
    ) -> None:
        """Adds a tile to the sums."""
        dst = self.refs["dquery_sums"].at[self.schedule.row, head, query_block]
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
            dst = epilogue.dst(self.refs, self.schedule.row, query_block, head, n)
            plgpu.copy_smem_to_gmem(self.results.at[slot, n, 0], dst, commit_group=False)

    def _needs_sums(self, number: Index, query_block: Index) -> Bool[Array, ""]:
        """Whether a step makes the result from the sums of other programs."""
        schedule = self.schedule
        return (
            (number < schedule.steps)
            & schedule.adds_last(query_block)
            & (schedule.adders_before(query_block) > 0)
        )

    def _release(self, number: Index, state: _State) -> None:
        """Releases the slot of a step, unless that needs sums."""
        _, query_block = self.schedule.coordinates(*state)
        free = self.barriers["dquery_free"].at[slot_of(number, SLOTS)]
        if self.epilogue is None:
            plgpu.barrier_arrive(free)
        else:
            needs_sums = self._needs_sums(number, query_block)
            pl.when(~needs_sums)(lambda: plgpu.barrier_arrive(free))

    def _release_with_sums(self, number: Index, state: _State) -> None:
        """Copies sums to the slot of a step that needs them, whose arrival releases it."""
        head, query_block = self.schedule.coordinates(*state)
        if self.epilogue is None:
            return

        @pl.when(self._needs_sums(number, query_block))
        def copy():
            slot = slot_of(number, SLOTS)
            src = self.refs["dquery_sums"].at[self.schedule.row, head, query_block]
            free = self.barriers["dquery_free"].at[slot]
            plgpu.copy_gmem_to_smem(src, self.buffers.at[slot], free)

    def _wait_turn(
        self,
        number: Index,
        state: _State,
        signal_tile: Sequence[Index],
        signals: Index,
    ) -> None:
        """Waits until a step, if it exists, may add; signals the step two before it.

        A step's semaphore is incremented one step later, when its copy has usually finished.
        """
        head, query_block = self.schedule.coordinates(*state)
        exists = number < self.schedule.steps
        head, query_block = jnp.where(exists, head, 0), jnp.where(exists, query_block, 0)
        before = adders_to_wait_for(self.pipeline, self.schedule, query_block)
        before = jnp.where(exists, before, 0)
        semaphore_signal_and_wait(
            self.adders.at[*signal_tile],
            signals,
            self.adders.at[head, query_block],
            before,
            behind=1,
        )


def adders_to_wait_for(
    pipeline: BackwardPipeline, schedule: ProgramSchedule, query_block: Index
) -> Index:
    """How many programs must have added to a tile of queries before this one does."""
    number = schedule.adders_before(query_block)
    return number if pipeline.deterministic else jnp.minimum(number, 1)


def signals_others(pipeline: BackwardPipeline, before: Index) -> Index:
    """Whether programs wait for what this one adds, as the first one or after ``before``."""
    return jnp.int32(1 if pipeline.deterministic else before == 0)


def store_or_add(pipeline: BackwardPipeline, src: Any, dst: Any, before: Index) -> None:
    """Copies to global memory if no program or launch has added before, else adds."""

    def copy(reduction):
        plgpu.copy_smem_to_gmem(src, dst, commit_group=False, reduction_op=reduction)

    if pipeline.sums is not None:
        copy("add")
        return
    pl.when(before == 0)(partial(copy, None))
    pl.when(before > 0)(partial(copy, "add"))


def signal_last_step(semaphore: Any, signals: Index) -> None:
    """Signals the last step, and waits until all copies have been written."""
    semaphore_signal_and_wait(semaphore, signals, semaphore, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
