"""The producer of the backward kernel for short windows, which also computes delta and dq.

It copies keys, values, queries, outputs and their gradients to shared memory through TMA. As it has
registers and time left, it computes ``-delta``, the sums of outputs times their gradients, and
multiplies the gradients of logits of all consumers with the keys. So the gradient of a query is
complete in one place and is stored once.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float32

from pallas_kernels._mosaic_gpu.backward.short_windows_schedule import (
    CONSUMERS,
    MAX_TILES_BACK,
    SLOTS,
    TILE,
    ShortSchedule,
    key_block_of,
    key_slot,
)
from pallas_kernels._mosaic_gpu.padding import zero_padding
from pallas_kernels._mosaic_gpu.primitives import MATRIX, Index, fori, load_as
from pallas_kernels._spec import Spec, plus


def step_arrays(schedule: ShortSchedule) -> tuple[str, ...]:
    """The arrays that are copied at each step, all of which arrive on the barrier "query"."""
    bounds = ("start", "padding") if schedule.packed else ()
    ends = ("end",) if schedule.has_ends else ()
    return ("query", "dout", "out", "shift", *bounds, *ends)


class DqProducer:
    """The warpgroup that copies, and computes delta and dq.

    A step is a query head at a tile of queries.

    Args:
        spec: static settings.
        schedule: of the launch.
        tiles_of_others: tiles of queries that ``refs["others"]`` has gradients of, through keys of
            other launches; 0 where there is none.
        refs: arrays in global memory.
        smem: the buffers of `short_windows`.
        barriers: its barriers.
    """

    def __init__(
        self,
        spec: Spec,
        schedule: ShortSchedule,
        tiles_of_others: int,
        refs: dict[str, Any],
        smem: dict[str, Any],
        barriers: dict[str, Any],
    ):
        self.spec, self.schedule, self.tiles_of_others = spec, schedule, tiles_of_others
        self.refs, self.smem, self.barriers = refs, smem, barriers
        # At first the buffers of dlogits are free.
        for n in range(2):
            plgpu.barrier_arrive(barriers["dlogits_free"].at[n])
        self.chunk = schedule.program_chunk()
        self.steps = (self.chunk.stop - self.chunk.first) * schedule.group_size

    def run(self) -> None:
        """Runs all steps of the program."""
        for n in range(-MAX_TILES_BACK, 1):
            self._copy_keys(self.chunk.first + n)
        self._copy_queries(jnp.int32(0))

        @pl.when(self.steps > 1)
        def copy_second_queries():
            self._copy_queries(jnp.int32(1))

        for consumer in range(CONSUMERS):
            plgpu.barrier_wait(self.barriers["key"].at[consumer])
        self._compute_delta(jnp.int32(0))
        fori(0, self.steps, self._step, None)
        plgpu.wait_smem_to_gmem(0)

    def _step(self, number: Index, _) -> None:
        """Computes dq of a step and delta of the next one; copies what later steps need."""
        barriers, chunk = self.barriers, self.chunk
        _, query_block, head = self._coordinates(number)
        buffer = lax.bitwise_and(number, jnp.int32(1))
        is_first_head = head == chunk.kv_head * self.schedule.group_size

        @pl.when(number + 1 < self.steps)
        def compute_next_delta():
            self._compute_delta(number + 1)

        @pl.when(is_first_head & (query_block > chunk.first))
        def wait_for_keys():  # the newest tile, copied since the tile of queries before
            plgpu.barrier_wait(barriers["key"].at[lax.rem(query_block, jnp.int32(CONSUMERS))])

        # Until all consumers have stored the gradients of logits of this step.
        plgpu.barrier_wait(barriers["dlogits"].at[buffer])

        # All consumers are at this tile of queries. So the slot of the next tile of keys, which
        # was that of a tile of keys before those that this step needs, is free.
        @pl.when(is_first_head & (query_block + 1 < chunk.stop))
        def copy_next_keys():
            self._copy_keys(query_block + 1)

        self._copy_queries_ahead(number)
        accumulator = plgpu.ACC((TILE, self.smem["query"].shape[2]), jnp.float32)
        multiply = partial(self._multiply_dlogits, query_block, buffer)
        dquery = pl.run_scoped(multiply, accumulator)
        plgpu.barrier_arrive(barriers["dlogits_free"].at[buffer])

        @pl.when(self.schedule.is_written(query_block, chunk))
        def write():
            self._write(dquery, self.schedule.query_tile(query_block), head)

    def _coordinates(self, number: Index) -> tuple[Index, Index, Index]:
        """(slot, tile of queries, query head) of a step."""
        group_size = jnp.int32(self.schedule.group_size)
        query_block = self.chunk.first + lax.div(number, group_size)
        head = self.chunk.kv_head * self.schedule.group_size + lax.rem(number, group_size)
        return lax.rem(number, jnp.int32(SLOTS)), query_block, head

    def _copy_keys(self, key_block: Index) -> None:
        """Copies a tile of keys and values; one before the sequence stands for the first one."""
        consumer = lax.rem(key_block + CONSUMERS, jnp.int32(CONSUMERS))
        arrived = self.barriers["key"].at[consumer]
        rows = pl.ds(jnp.maximum(key_block, 0) * TILE, TILE)
        for name in ("key", "value"):
            src = self.refs[name].at[self.chunk.row, rows, self.chunk.kv_head]
            plgpu.copy_gmem_to_smem(src, self.smem[name].at[key_slot(key_block)], arrived)

    def _copy_queries(self, number: Index) -> None:
        """Copies what a step needs of its queries."""
        slot, query_block, head = self._coordinates(number)
        tile = self.schedule.copied_query_tile(query_block)
        arrived, rows = self.barriers["query"].at[slot], pl.ds(tile * TILE, TILE)
        row = self.chunk.row
        indices: dict[str, Any] = {
            "query": (row, rows, head),
            "dout": (row, rows, head),
            "out": (row, rows, head),
            "shift": (row, head, rows),
            "start": (row, rows),
            "padding": (row, tile),
            "end": (row, rows),
        }
        for name in step_arrays(self.schedule):
            src = self.refs[name].at[indices[name]]
            plgpu.copy_gmem_to_smem(src, self.smem[name].at[slot], arrived)

    def _copy_queries_ahead(self, number: Index) -> None:
        """Copies the queries of a later step to the slot of the step before this one."""
        ahead = number + SLOTS - 1

        @pl.when(ahead < self.steps)
        def copy_queries():
            @pl.when(number > 0)
            def wait():
                slot = lax.rem(ahead, jnp.int32(SLOTS))
                plgpu.barrier_wait(self.barriers["query_free"].at[slot])

            self._copy_queries(ahead)

    def _compute_delta(self, number: Index) -> None:
        """Computes ``-delta`` of a step's queries, for the consumers and for the caller."""
        slot, query_block, head = self._coordinates(number)
        plgpu.barrier_wait(self.barriers["query"].at[slot])
        self._zero_padding(slot, query_block)
        out = load_as(self.smem["out"].at[slot], MATRIX).astype(jnp.float32)
        dout = load_as(self.smem["dout"].at[slot], MATRIX).astype(jnp.float32)
        minus_delta = self.smem["delta"].at[slot]
        minus_delta[...] = -(out * dout).sum(axis=1)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.barriers["delta"].at[slot])

        @pl.when(self.schedule.is_written(query_block, self.chunk))
        def write():
            rows = pl.ds(self.schedule.query_tile(query_block) * TILE, TILE)
            dst = self.refs["minus_delta"].at[self.chunk.row, head, rows]
            plgpu.copy_smem_to_gmem(minus_delta, dst)

    def _zero_padding(self, slot: Index, query_block: Index) -> None:
        """Zeros in the padding of a tile of queries; the consumers wait for delta, so for this."""
        if not self.schedule.packed:
            return

        @pl.when(self.smem["padding"][slot, 0] != 0)
        def write():
            tiles = [self.smem[name].at[slot] for name in ("query", "dout")]
            first = self.schedule.copied_query_tile(query_block) * TILE
            first = plus(first, self.spec.first_key)
            zero_padding(tiles, self.smem["start"].at[slot], first)

    def _multiply_dlogits(
        self, query_block: Index, buffer: Index, dquery: Any
    ) -> Float32[Array, "64 H"]:
        """Products of the gradients of logits and the keys, summed over all consumers."""
        for consumer in range(CONSUMERS):
            keys = self.smem["key"].at[key_slot(key_block_of(query_block, consumer))]
            plgpu.wgmma(dquery, self.smem["dlogits"].at[buffer, consumer].T, keys)
        return dquery[...]

    def _write(self, dquery: Float32[Array, "64 H"], query_block: Index, head: Index) -> None:
        """Scales the gradients of a tile of queries, adds those of other launches, and writes."""
        row, result = self.chunk.row, dquery * self.spec.scale
        dst = (row, pl.ds(query_block * TILE, TILE), head)
        if self.tiles_of_others:
            first = jnp.minimum(query_block, self.tiles_of_others - 1) * TILE
            src = (row, pl.ds(first, TILE), head)
            result = lax.cond(
                query_block < self.tiles_of_others,
                lambda x: x + load_as(self.refs["others"].at[src], MATRIX),
                lambda x: x,
                result,
            )
        # The copy of the tile before this one has read the buffer.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.smem["dquery"][...] = result.astype(self.smem["dquery"].dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.smem["dquery"], self.refs["dquery"].at[dst])
