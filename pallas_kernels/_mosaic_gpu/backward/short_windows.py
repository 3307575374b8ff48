"""Backward kernel in Mosaic GPU, for Hopper and short windows: dq, dk and dv, each stored once.

A program goes through a chunk of the sequence, for one head of keys (`short_windows_schedule`).
Three consumer warpgroups compute, each with one of the three tiles of keys that a tile of queries
may see. A consumer keeps dk and dv of its tile in registers until no later query sees it. The
fourth warpgroup copies, and computes dq and delta (`short_windows_dq`). Nothing is added up in
global memory, so results repeat their bits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Float32, Int

from pallas_kernels._kernels import BackwardInputs
from pallas_kernels._logits import LOWEST
from pallas_kernels._masks import sees
from pallas_kernels._mosaic_gpu.backward.launch import WARPGROUPS_APART, launch
from pallas_kernels._mosaic_gpu.backward.short_windows_dq import DqProducer
from pallas_kernels._mosaic_gpu.backward.short_windows_schedule import (
    CONSUMERS,
    KEY_SLOTS,
    SLOTS,
    TILE,
    ShortSchedule,
    chunk_tiles,
    key_block_of,
    key_slot,
    tiles_before_queries,
)
from pallas_kernels._mosaic_gpu.backward.softmax import (
    initial_logits,
    shift_of,
    softmax_backward,
    staging_columns,
    write_through_smem,
)
from pallas_kernels._mosaic_gpu.padding import FLAG_WIDTH, padding_flags, zero_padding
from pallas_kernels._mosaic_gpu.primitives import (
    MATRIX,
    ROW,
    broadcast_row,
    fence_async_smem,
    fori,
    load_as,
    opaque_to_compiler,
    swizzled,
    zeros,
)
from pallas_kernels._spec import Spec

SUBTILE = 32
"""Queries of a tile whose logits a consumer has in registers at a time."""


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
    num_kv_heads, num_keys = run.value.shape[2], run.value.shape[1]
    query_tiles = pl.cdiv(length, TILE)
    num_tiles = query_tiles + tiles_before_queries(run.offset)
    schedule = ShortSchedule(
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
    operands, tiles_of_others = _operands(spec, inputs, dquery)
    outputs = {
        "dquery": jax.ShapeDtypeStruct(query.shape, dquery_dtype),
        "dkey": jax.ShapeDtypeStruct(run.key.shape, dkey_dtype),
        "dvalue": jax.ShapeDtypeStruct(run.value.shape, dkey_dtype),
        "minus_delta": jax.ShapeDtypeStruct((batch, heads, query_tiles * TILE), jnp.float32),
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

    # A multiprocessor has 512 registers for each thread of a warpgroup.
    @pl.when(warpgroup < CONSUMERS)
    def consumers():
        plgpu.set_max_registers(144, action="increase")
        _Consumer(spec, schedule, refs, smem, barriers, warpgroup).run()

    @pl.when(warpgroup == CONSUMERS)
    def producer():
        plgpu.set_max_registers(80, action="decrease")
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
    copies = (6 if schedule.packed else 4) + schedule.has_ends
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


class _Consumer:
    """One of the warpgroups that compute weights, the gradients of logits, dk and dv.

    Args:
        spec: static settings.
        schedule: of the launch.
        refs: arrays in global memory.
        smem: buffers of `_smem`.
        barriers: those of `_barriers`.
        warpgroup: which of the consumers this is.
    """

    def __init__(
        self,
        spec: Spec,
        schedule: ShortSchedule,
        refs: dict[str, Any],
        smem: dict[str, Any],
        barriers: dict[str, Any],
        warpgroup: Int[Array, ""],
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

    def _key_tile(self, number: Int[Array, ""], _) -> None:
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

    def _zero_padding_of_keys(self, key_block: Int[Array, ""]) -> None:
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

    def _step(self, key_block, first_query_block, steps_before, n, carry):
        """Adds what flows through a head of a tile of queries to dk and dv, the carry."""
        barriers = self.barriers
        number = steps_before + n
        slot = lax.rem(number, jnp.int32(SLOTS))
        buffer = lax.bitwise_and(number, jnp.int32(1))
        query_block = first_query_block + lax.div(n, jnp.int32(self.schedule.group_size))
        keys = key_slot(key_block)
        plgpu.barrier_wait(barriers["query"].at[slot])
        plgpu.barrier_wait(barriers["delta"].at[slot])
        unmasked = self._is_unmasked(slot, query_block, key_block)
        for part in range(TILE // SUBTILE):
            carry = self._subtile(
                part, slot, buffer, keys, query_block, key_block, unmasked, *carry
            )
        plgpu.barrier_arrive(barriers["query_free"].at[slot])
        return carry

    def _is_unmasked(self, slot, query_block, key_block) -> Bool[Array, ""]:
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

    def _subtile(self, part, slot, buffer, keys, query_block, key_block, unmasked, dkey, dvalue):
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
                plgpu.barrier_wait(barriers["dlogits_free"].at[buffer])
            smem["dlogits"].at[buffer, self.warpgroup, :, rows][...] = dlogits
            if part == TILE // SUBTILE - 1:
                fence_async_smem()
                plgpu.barrier_arrive(barriers["dlogits"].at[buffer])
            plgpu.wgmma_wait(0)

        initial = dkey, dvalue, initial_logits(spec, shift), minus_delta
        return pl.run_state(multiply)(tuple(map(plgpu.ACC.init, initial)))[:2]

    def _mask(self, part, slot, query_block, key_block, weights):
        """Weights, zero where queries do not see keys."""
        packed = self.schedule.packed
        j = plgpu.broadcasted_iota(jnp.int32, (TILE, SUBTILE), 0, layout=MATRIX)
        i = plgpu.broadcasted_iota(jnp.int32, (TILE, SUBTILE), 1, layout=MATRIX)
        query_tile = self.schedule.query_tile(query_block)
        i = i * opaque_to_compiler(1) + (query_tile * TILE + part * SUBTILE)
        key = j + key_block * TILE
        offset, num_keys = self.schedule.offset, self.schedule.num_keys
        j = key + offset if offset else key

        def bounds(name):
            rows = pl.ds(part * SUBTILE, SUBTILE)
            return broadcast_row(load_as(self.smem[name].at[slot, rows], ROW))

        starts = bounds("start") if packed else None
        ends = bounds("end") if self.schedule.has_ends else None
        seen = sees(i, j, starts, self.spec.window, 0, packed=packed, end=ends) & (key >= 0)
        if offset:
            seen &= (key < num_keys) & (i >= 0)
        return jnp.where(seen, weights, 0.0)
