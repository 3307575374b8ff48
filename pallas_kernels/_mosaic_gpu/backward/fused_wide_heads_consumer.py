"""The consumer warpgroups of `fused_wide_heads`: one has dv in its registers, the other one dk.

The consumer of *values* computes the softmax and dv. It passes the factors of the gradients of
logits (`softmax_weights`) to the consumer of *keys*, through shared memory and in float32. That one
computes the gradients of logits and dk, and passes the gradients of logits back for dq. Both
compute dq, in slices of columns that alternate between them.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32

from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward.dkv_reduce import MAX_COLUMNS, reduce_parts_in_order
from pallas_kernels._mosaic_gpu.backward.pipeline import BackwardPipeline
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
    Index,
    broadcast_row,
    fence_async_smem,
    load_as,
    zeros,
)

KEY_TILE = ROWS
"""Keys of a tile."""


DQUERY_COLUMNS = 64
"""Columns of a slice of dq."""


ACCUMULATOR_COLUMNS = MAX_COLUMNS
"""Columns of an accumulator of dk or dv at most: a product needs registers beside it."""


SLOTS = 2
"""Tiles of queries in shared memory. There is one of the gradients of outputs."""

_Sums = tuple[Float32[Array, "64 _"], ...]
"""dkey, before the scale, or dvalue, in parts of `ACCUMULATOR_COLUMNS` side by side."""


class Consumer:
    """A warpgroup that computes: `run_values` is what the first one runs, `run_keys` the second.

    Args:
        pipeline: the launch.
        refs: arrays in global memory.
        smem: the buffers of `fused_wide_heads`.
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
        self.pipeline, self.spec, self.dtype = pipeline, pipeline.spec, pipeline.query.dtype
        self.masks, self.warpgroup = pipeline.masks, warpgroup
        self.refs, self.smem, self.barriers = refs, smem, barriers
        self.program = pipeline.program_schedule(refs)
        self.key_bounds = pipeline.masks.key_bounds(refs)
        # At first all shared memory is free.
        plgpu.barrier_arrive(barriers["dlogits_free"])
        plgpu.barrier_arrive(barriers["dout_free"].at[0])
        for slot in range(SLOTS):
            plgpu.barrier_arrive(barriers["query_free"].at[slot])

    def run_values(self) -> None:
        """Computes weights, dvalue, and every other slice of dquery."""
        first_key = self.program.key_block * KEY_TILE + self.pipeline.run.offset
        plgpu.barrier_wait(self.barriers["key"])
        self.masks.zero_padding_of_keys(self.refs, self.smem, self.program)
        dim = self.pipeline.run.value.shape[3]
        step = partial(self._values_step, first_key)
        self._write("dvalue", fold_steps(self.program, step, _zeros(dim)), 1.0)

    def run_keys(self) -> None:
        """Computes the gradients of logits, dkey, and the other slices of dquery."""
        # At first the buffer of factors is free.
        plgpu.barrier_arrive(self.barriers["factors_free"])
        plgpu.barrier_wait(self.barriers["key"])
        self.masks.zero_padding_of_keys(self.refs, self.smem, self.program)
        dkeys = fold_steps(self.program, self._keys_step, _zeros(self.pipeline.dim))
        self._write("dkey", dkeys, self.spec.scale)

    def _values_step(
        self,
        first_key: Index,
        head: Index,
        query_block: Index,
        number: Index,
        dvalues: _Sums,
    ) -> _Sums:
        """Adds what flows through one tile of queries to dvalue, the carry."""
        del head
        spec, smem, barriers = self.spec, self.smem, self.barriers
        unmasked = self.program.is_unmasked(query_block)
        slot = slot_of(number, SLOTS)
        plgpu.barrier_wait(barriers["query"].at[slot])
        self.masks.zero_padding_of_queries(smem, slot, query_block, {"query": slot})
        shift = broadcast_row(load_as(smem["shift"].at[slot], ROW))
        bounds = self.masks.query_bounds(smem, slot)

        def multiply(accumulators):
            *dvalues, logits = accumulators
            plgpu.wgmma(logits, smem["key"], smem["query"].at[slot].T)
            mask = partial(self.masks.apply, bounds, first_key, self.key_bounds, query_block)
            products = plgpu.wgmma_accumulator_load(logits)
            weights, factors = softmax_weights(spec, products, shift, unmasked, mask)
            plgpu.barrier_arrive(barriers["query_free"].at[slot])
            # Until the consumer of keys has read the factors of the step before.
            plgpu.barrier_wait(barriers["factors_free"])
            register_tiles.store(smem["factors"], factors)
            plgpu.barrier_arrive(barriers["factors"])
            plgpu.barrier_wait(barriers["dout"].at[0])
            self.masks.zero_padding_of_queries(smem, slot, query_block, {"dout": 0})
            _multiply_add(dvalues, weights.astype(self.dtype), smem["dout"].at[0])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(barriers["dout_free"].at[0])

        initial = *dvalues, initial_logits(spec, shift)
        found = pl.run_state(multiply)(tuple(map(plgpu.ACC.init, initial)))
        # Until the consumer of keys has stored the gradients of logits.
        plgpu.barrier_wait(barriers["dlogits"])
        self._store_dquery(0)
        return found[:-1]

    def _keys_step(
        self,
        head: Index,
        query_block: Index,
        number: Index,
        dkeys: _Sums,
    ) -> _Sums:
        """Adds what flows through one tile of queries to dkey, the carry."""
        del head
        smem, barriers = self.smem, self.barriers
        slot = slot_of(number, SLOTS)
        if self.pipeline.packed:  # the flag of padding comes with the queries
            plgpu.barrier_wait(barriers["query"].at[slot])
        plgpu.barrier_wait(barriers["dout"].at[0])
        slots: dict[str, Index | int] = {"query": slot, "dout": 0}
        self.masks.zero_padding_of_queries(smem, slot, query_block, slots)
        minus_delta = broadcast_row(load_as(smem["delta"].at[0], ROW))

        def multiply(accumulators):
            *dkeys, dweights = accumulators
            plgpu.wgmma(dweights, smem["value"], smem["dout"].at[0].T)
            products = plgpu.wgmma_accumulator_load(dweights)
            plgpu.barrier_arrive(barriers["dout_free"].at[0])
            # Until the consumer of values has stored the factors.
            plgpu.barrier_wait(barriers["factors"])
            factors = register_tiles.load(smem["factors"], QUERY_TILE)
            dlogits = (factors * products).astype(self.dtype)
            plgpu.barrier_arrive(barriers["factors_free"])
            # Until both consumers have computed dq of the step before.
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
        found = pl.run_state(multiply)(tuple(map(plgpu.ACC.init, initial)))
        self._store_dquery(1)
        return found[:-1]

    def _store_dquery(self, first: int) -> None:
        """Computes every other slice of dquery, from ``first`` on; stores it in shared memory."""
        smem, barriers = self.smem, self.barriers
        slices = self.pipeline.dim // DQUERY_COLUMNS

        def multiply(n, dquery):
            columns = pl.ds(n * DQUERY_COLUMNS, DQUERY_COLUMNS)
            plgpu.wgmma(dquery, smem["dlogits"].T, smem["key"].at[:, columns])
            result = plgpu.wgmma_accumulator_load(dquery)
            if n + 2 >= slices:  # this warpgroup's last one
                plgpu.barrier_arrive(barriers["dlogits_free"])
            # Until the dq accumulator has copied this warpgroup's slice before.
            plgpu.barrier_wait(barriers["dquery_free"].at[first])
            register_tiles.store(smem["dquery"].at[first, 0], result)
            fence_async_smem()
            plgpu.barrier_arrive(barriers["dquery"].at[first])

        for n in range(first, slices, 2):
            accumulator = plgpu.ACC((QUERY_TILE, DQUERY_COLUMNS), jnp.float32)
            pl.run_scoped(partial(multiply, n), accumulator)

    def _write(self, name: str, results: _Sums, scale: float) -> None:
        """Writes dkey or dvalue, which is ``scale`` times the results side by side."""
        program = self.program

        def write(results):
            for n, result in enumerate(results[name]):

                def dst(column, columns, first=n * ACCUMULATOR_COLUMNS):
                    rows = pl.ds(program.key_block * KEY_TILE, KEY_TILE)
                    columns = pl.ds(first + column, columns)
                    return self.refs[name].at[program.row, rows, program.kv_head, columns]

                write_through_smem(result * scale, self.smem["out"].at[self.warpgroup], dst)
            plgpu.wait_smem_to_gmem(0)

        reduce_parts_in_order(program, self.refs, self.warpgroup, 0, {name: results}, write)


def _zeros(dim: int) -> _Sums:
    """Accumulators for so many columns."""
    return tuple(
        zeros(min(ACCUMULATOR_COLUMNS, dim - first)) for first in range(0, dim, ACCUMULATOR_COLUMNS)
    )


def _multiply_add(accumulators: list[Any], left: Float[Array, "64 keys"], right: Any) -> None:
    """Adds ``left @ right`` to accumulators that lie side by side."""
    for n, accumulator in enumerate(accumulators):
        columns = pl.ds(n * ACCUMULATOR_COLUMNS, accumulator.shape[1])
        plgpu.wgmma(accumulator, left, right.at[:, columns])
