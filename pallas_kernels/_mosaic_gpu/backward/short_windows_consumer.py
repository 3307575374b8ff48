"""A consumer warpgroup of the backward kernel for short windows.

It has one of the tiles of keys that a tile of queries may see, keeps dk and dv of these keys in
registers until no later query sees them, and then takes another tile. It computes weights and the
gradients of logits, which it passes to the producer through shared memory for dq.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float32

from pallas_kernels._masks import sees
from pallas_kernels._mosaic_gpu.backward.short_windows_schedule import (
    CONSUMERS,
    SLOTS,
    TILE,
    ShortSchedule,
    key_block_of,
    key_slot,
)
from pallas_kernels._mosaic_gpu.backward.softmax import (
    initial_logits,
    softmax_backward,
    write_through_smem,
)
from pallas_kernels._mosaic_gpu.padding import zero_padding
from pallas_kernels._mosaic_gpu.primitives import (
    MATRIX,
    ROW,
    Index,
    broadcast_row,
    fence_async_smem,
    fori,
    load_as,
    opaque_to_compiler,
    zeros,
)
from pallas_kernels._spec import Spec, plus

SUBTILE = 32
"""Queries of a tile whose logits a consumer has in registers at a time."""


_Sums = tuple[Float32[Array, "64 H"], Float32[Array, "64 Hv"]]
"""dkey, before the scale, and dvalue of a consumer's tile of keys."""


class Consumer:
    """One of the warpgroups that compute weights, the gradients of logits, dk and dv.

    Args:
        spec: static settings.
        schedule: of the launch.
        refs: arrays in global memory.
        smem: the buffers of `short_windows`.
        barriers: its barriers.
        warpgroup: which of the consumers this is.
    """

    def __init__(
        self,
        spec: Spec,
        schedule: ShortSchedule,
        refs: dict[str, Any],
        smem: dict[str, Any],
        barriers: dict[str, Any],
        warpgroup: Index,
    ):
        self.spec, self.schedule, self.warpgroup = spec, schedule, warpgroup
        self.refs, self.smem, self.barriers = refs, smem, barriers
        self.chunk = schedule.program_chunk()

    def run(self) -> None:
        """Computes one tile of keys after the other."""
        chunk = self.chunk
        last = chunk.stop - 1 - key_block_of(chunk.first, self.warpgroup)
        fori(0, lax.div(last, jnp.int32(CONSUMERS)) + 1, self._key_tile, None)
        plgpu.wait_smem_to_gmem(0)

    def _key_tile(self, number: Index, _) -> None:
        """Computes the gradients of a tile of keys and values, and writes them."""
        chunk = self.chunk
        key_block = key_block_of(chunk.first, self.warpgroup) + number * CONSUMERS
        plgpu.barrier_wait(self.barriers["key"].at[self.warpgroup])
        self._zero_padding_of_keys(key_block)
        first_query_block = jnp.maximum(key_block, chunk.first)
        query_tiles = jnp.minimum(key_block + CONSUMERS, chunk.stop) - first_query_block
        group_size = self.schedule.group_size
        steps_before = (first_query_block - chunk.first) * group_size
        step = partial(self._step, key_block, first_query_block, steps_before)
        dim, value_dim = (self.smem[name].shape[2] for name in ("query", "dout"))
        results = fori(0, query_tiles * group_size, step, (zeros(dim), zeros(value_dim)))

        @pl.when((key_block >= chunk.first) & (key_block < chunk.end))
        def write():
            dkey, dvalue = results
            rows = pl.ds(key_block * TILE, TILE)
            for name, result in (("dvalue", dvalue), ("dkey", dkey * self.spec.scale)):

                def dst(column, columns, ref=self.refs[name]):
                    return ref.at[chunk.row, rows, chunk.kv_head, pl.ds(column, columns)]

                write_through_smem(result, self.smem["dkeys"].at[self.warpgroup], dst)

    def _zero_padding_of_keys(self, key_block: Index) -> None:
        """Zeros in the padding of a tile of keys and values.

        The producer reads these keys only after this consumer has arrived on "dlogits".
        """
        if not self.schedule.packed or self.spec.lookahead:
            return  # where keys are moved, padding has been zeros before the launch
        # In place of a tile before the sequence stands the first one.
        row, tile = self.chunk.row, jnp.maximum(key_block, 0)

        @pl.when(self.refs["padding"][row, tile, 0] != 0)
        def write():
            tiles = [self.smem[name].at[key_slot(key_block)] for name in ("key", "value")]
            starts = self.refs["start"].at[row, pl.ds(tile * TILE, TILE)]
            zero_padding(tiles, starts, tile * TILE)

    def _step(
        self,
        key_block: Index,
        first_query_block: Index,
        steps_before: Index,
        n: Index,
        carry: _Sums,
    ) -> _Sums:
        """Adds what flows through a head of a tile of queries to dk and dv, the carry."""
        barriers = self.barriers
        number = steps_before + n
        slot = lax.rem(number, jnp.int32(SLOTS))
        buffer = lax.bitwise_and(number, jnp.int32(1))
        query_block = first_query_block + lax.div(n, jnp.int32(self.schedule.group_size))
        keys = key_slot(key_block)
        # Until the producer's copies for this step have arrived, and it has computed delta of them.
        plgpu.barrier_wait(barriers["query"].at[slot])
        plgpu.barrier_wait(barriers["delta"].at[slot])
        unmasked = self._is_unmasked(slot, query_block, key_block)
        for part in range(TILE // SUBTILE):
            carry = self._subtile(part, slot, buffer, query_block, key_block, keys, unmasked, carry)
        plgpu.barrier_arrive(barriers["query_free"].at[slot])
        return carry

    def _is_unmasked(self, slot: Index, query_block: Index, key_block: Index) -> Bool[Array, ""]:
        """Whether all queries of a tile see all keys of another."""
        schedule, smem, window = self.schedule, self.smem, self.spec.window
        assert window is not None
        offset, beyond = schedule.offset, schedule.tiles_before_queries * TILE + schedule.offset
        unmasked = (key_block < query_block) & (key_block >= 0)
        # The last query sees the first key.
        unmasked &= (query_block - key_block + 1) * TILE - 1 <= window + beyond
        if offset:
            unmasked &= query_block >= schedule.tiles_before_queries
            unmasked &= (key_block + 1) * TILE <= schedule.num_keys
            # The first query sees the last key.
            unmasked &= (query_block - key_block) * TILE >= TILE - 1 + beyond
        if schedule.packed:
            unmasked &= smem["start"][slot, TILE - 1] <= schedule.first_key(key_block)
            if schedule.has_ends:
                unmasked &= schedule.first_key(key_block) + TILE <= smem["end"][slot, 0]
        return unmasked

    def _subtile(
        self,
        part: int,
        slot: Index,
        buffer: Index,
        query_block: Index,
        key_block: Index,
        keys: Index,
        unmasked: Bool[Array, ""],
        sums: _Sums,
    ) -> _Sums:
        """Adds what flows through `SUBTILE` queries to dk and dv."""
        spec, smem, barriers = self.spec, self.smem, self.barriers
        rows = pl.ds(part * SUBTILE, SUBTILE)
        query_smem, dout_smem = smem["query"].at[slot, rows], smem["dout"].at[slot, rows]
        shift = broadcast_row(load_as(smem["shift"].at[slot, rows], ROW))
        minus_delta = broadcast_row(load_as(smem["delta"].at[slot, rows], ROW))
        mask = partial(self._mask, part, slot, query_block, key_block)

        def multiply(accumulators):
            dkey, dvalue, logits, dweights = accumulators
            plgpu.wgmma(logits, smem["key"].at[keys], query_smem.T)
            plgpu.wgmma(dweights, smem["value"].at[keys], dout_smem.T)
            weights, dlogits = softmax_backward(
                spec, logits, dweights, shift, unmasked, mask, query_smem.dtype
            )
            plgpu.wgmma(dvalue, weights, dout_smem)
            plgpu.wgmma(dkey, dlogits, query_smem)
            if part == 0:
                # Until the producer has read what the buffer held, of two steps before.
                plgpu.barrier_wait(barriers["dlogits_free"].at[buffer])
            smem["dlogits"].at[buffer, self.warpgroup, :, rows][...] = dlogits
            if part == TILE // SUBTILE - 1:
                fence_async_smem()
                plgpu.barrier_arrive(barriers["dlogits"].at[buffer])
            plgpu.wgmma_wait(0)

        initial = *sums, initial_logits(spec, shift), minus_delta
        return pl.run_state(multiply)(tuple(map(plgpu.ACC.init, initial)))[:2]

    def _mask(
        self,
        part: int,
        slot: Index,
        query_block: Index,
        key_block: Index,
        weights: Float32[Array, "64 queries"],
    ) -> Float32[Array, "64 queries"]:
        """Weights, zero where queries do not see keys."""
        packed = self.schedule.packed
        j = plgpu.broadcasted_iota(jnp.int32, (TILE, SUBTILE), 0, layout=MATRIX)
        i = plgpu.broadcasted_iota(jnp.int32, (TILE, SUBTILE), 1, layout=MATRIX)
        query_tile = self.schedule.query_tile(query_block)
        i = i * opaque_to_compiler(1) + (query_tile * TILE + part * SUBTILE)
        key = j + key_block * TILE
        offset, num_keys = self.schedule.offset, self.schedule.num_keys
        j = plus(key, offset)

        def bounds(name):
            rows = pl.ds(part * SUBTILE, SUBTILE)
            return broadcast_row(load_as(self.smem[name].at[slot, rows], ROW))

        starts = bounds("start") if packed else None
        ends = bounds("end") if self.schedule.has_ends else None
        seen = sees(i, j, starts, self.spec.window, 0, packed=packed, end=ends) & (key >= 0)
        if offset:
            seen &= (key < num_keys) & (i >= 0)
        return jnp.where(seen, weights, 0.0)
