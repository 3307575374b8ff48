"""A warpgroup of the forward kernel that computes: its part of the rows of each tile of queries.

The softmax of a tile of keys runs beside the product of the weights and values of the tile before::

    tensor cores:  Q K0'                Q K1'  P0 V0 ........  Q K2'  P1 V1 ........        P2 V2
    this warpgroup:      softmax of 0          softmax of 1           softmax of 2
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._logits import LOWEST
from pallas_kernels._mosaic_gpu.forward.config import ForwardConfig
from pallas_kernels._mosaic_gpu.forward.epilogue import Epilogue
from pallas_kernels._mosaic_gpu.forward.padding import zero_values
from pallas_kernels._mosaic_gpu.forward.softmax import OnlineSoftmax, TileMask
from pallas_kernels._mosaic_gpu.forward.work_tile import WorkTile
from pallas_kernels._mosaic_gpu.primitives import (
    COLUMN,
    MATRIX,
    ROWS,
    broadcast_column,
    fori,
    load_as,
)
from pallas_kernels._mosaic_gpu.tiles import FOLD

_Sums = tuple[Array, Array, Array]
"""(row_max, row_sum, accumulator): [ROWS], [ROWS], [ROWS, Hv], in float32.

While a lazy softmax adds them up, row sums are [ROWS, FOLD].
"""


class _Keys(NamedTuple):
    """The tiles of keys of a tile of queries.

    Attributes:
        tile: of queries.
        mask: of a warpgroup's queries.
        used: how many tiles of keys came before the first one.
        zeroes_padding: whether the values of padding are zeroed.
    """

    tile: WorkTile
    mask: TileMask
    used: Array
    zeroes_padding: bool


class Consumer:
    """Computes a warpgroup's rows of each tile of queries.

    Args:
        config: static settings.
        refs: arrays in global memory.
        outputs: references to the output and to the log-sum-exp.
        smem: buffers of `ForwardConfig.smem`.
        barriers: those of `ForwardConfig.barriers`.
        warpgroup: which of the consumers this is.
    """

    def __init__(
        self,
        config: ForwardConfig,
        refs: dict[str, Any],
        outputs: tuple[Any, Any],
        smem: dict[str, Any],
        barriers: Any,
        warpgroup: Array,
    ):
        self.config, self.refs, self.warpgroup = config, refs, warpgroup
        self.smem, self.barriers = smem, barriers
        self.softmax = OnlineSoftmax(config)
        self.epilogue = Epilogue(config, outputs, smem, barriers, warpgroup)

    def run(self) -> None:
        """All tiles of this program."""
        scheduler = self.config.scheduler

        def step(number, used):
            stage = lax.rem(number, jnp.int32(self.config.tiles.query_slots))
            plgpu.barrier_wait(self.barriers["query"].at[stage])
            numbers = self.config.numbers(self.smem["bounds"], stage)
            tile = WorkTile.load(scheduler, numbers)
            self._tile(tile, stage, used)
            return used + tile.num_key_tiles

        fori(0, scheduler.num_work_tiles(), step, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _tile(self, tile: WorkTile, stage: Array, used: Array) -> None:
        """A tile of queries, which are in this stage; ``used`` counts earlier tiles of keys."""
        config = self.config
        starts = self.smem["bounds"].at[stage, self.warpgroup] if config.scheduler.packed else None
        mask = TileMask(config, self.refs, tile, self.warpgroup, starts)
        queries = self.smem["query"].at[stage, self.warpgroup]
        carry = self._initial()
        if tile.sinks is not None:
            carry = fori(0, tile.sinks.num, partial(self._sink_tile, queries, mask), carry)

        def visit(carry, zeroes_padding=False):
            keys = _Keys(tile, mask, used, zeroes_padding)
            row_max, row_sum, acc, weights = self._key_tiles(queries, keys, carry)
            self._free_queries(stage)
            acc = self._last_values(keys, acc, weights)
            return row_max, row_sum, acc

        def visit_any(carry):
            if tile.has_padding is None:
                return visit(carry)
            # Loops of their own: in one for both, padding cost other tiles 3 to 5% on an H100.
            with_zeros = partial(visit, zeroes_padding=True)
            return lax.cond(tile.has_padding > 0, with_zeros, visit, carry)

        def skip(carry):
            self._free_queries(stage)
            return carry

        row_max, row_sum, acc = lax.cond(tile.num_key_tiles > 0, visit_any, skip, carry)
        if config.tiles.lazy_rescale:
            row_sum = row_sum.sum(axis=1)
        sink_logits = None
        if config.has_sink_logits:
            # Only now: in registers from the tile's beginning on, the learned sinks made the
            # kernel 65% slower on an H100 (gpt-oss: 64/8 heads of 64, window 127).
            row = self.refs["sink_logits"].at[tile.batch_row, tile.head_tile]
            sink_logits = load_as(row, COLUMN)
        self.epilogue.write(tile, stage, row_max, row_sum, acc, sink_logits)
        if config.out_in_query_smem:
            # Until the copies of the results have read the queries' memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(self.barriers["query_free"].at[stage])

    def _initial(self) -> _Sums:
        """(row_max, row_sum, accumulator) before any key."""
        zeros = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), COLUMN)
        row_max, row_sum = zeros + LOWEST, zeros
        if self.config.tiles.lazy_rescale:
            row_sum = broadcast_column(row_sum, FOLD)
        acc = jnp.zeros((ROWS, self.config.value_dim), jnp.float32)
        return row_max, row_sum, plgpu.layout_cast(acc, MATRIX)

    def _sink_tile(self, queries: Any, mask: TileMask, n: Array, carry: _Sums) -> _Sums:
        """A tile of sinks, all at once: there are few."""
        row_max, row_sum, acc = carry
        plgpu.barrier_wait(self.barriers["sinks"])

        def multiply_keys(logits):
            plgpu.wgmma(logits, queries, self.smem["sink_key"].T)
            return logits[...]

        shape = plgpu.ACC((ROWS, self.config.scheduler.sink_tile), jnp.float32)
        products = pl.run_scoped(multiply_keys, shape)
        row_max, row_sum, correction, weights = self.softmax.update(
            products, row_max, row_sum, partial(mask.sinks, n)
        )

        def multiply_values(acc):
            plgpu.wgmma(acc, weights, self.smem["sink_value"])

        acc = acc * broadcast_column(correction, self.config.value_dim)
        acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(self.barriers["sinks_free"])
        return row_max, row_sum, acc

    def _key_tiles(
        self, queries: Any, keys: _Keys, carry: _Sums
    ) -> tuple[Array, Array, Array, Array]:
        """(sums, weights): all tiles of keys, but for the last one's weights times its values."""
        config, stage = self.config, self._stage(keys, 0)

        def multiply_keys(logits):
            plgpu.wgmma(logits, queries, self.smem["key"].at[stage].T)
            return logits[...]

        row_max, row_sum, acc = carry
        plgpu.barrier_wait(self.barriers["key"].at[stage])
        shape = plgpu.ACC((ROWS, config.tiles.key), jnp.float32)
        products = pl.run_scoped(multiply_keys, shape)
        plgpu.barrier_arrive(self.barriers["key_free"].at[stage])
        row_max, row_sum, correction, weights = self.softmax.update(
            products, row_max, row_sum, keys.mask.first
        )
        if config.scheduler.sink_tile:
            acc = self.softmax.rescale(acc, correction)
        step = partial(self._key_tile, queries, keys)
        return fori(1, keys.tile.num_key_tiles, step, (row_max, row_sum, acc, weights))

    def _key_tile(
        self, queries: Any, keys: _Keys, n: Array, carry: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        """The softmax of the ``n``-th tile of keys beside the product of the tile before."""
        row_max, row_sum, acc, weights = carry
        stage, before = self._stage(keys, n), self._stage(keys, n - 1)

        def beside(refs):
            acc, *results = refs

            def multiply(logits):
                if keys.zeroes_padding:
                    # Before a product is under way. The values were fetched before these keys.
                    self._wait_for_values(keys, n - 1)
                plgpu.barrier_wait(self.barriers["key"].at[stage])
                plgpu.wgmma(logits, queries, self.smem["key"].at[stage].T)
                if not keys.zeroes_padding:
                    self._wait_for_values(keys, n - 1)
                plgpu.wgmma(acc, weights, self.smem["value"].at[before])
                # The logits are complete; the product with the values goes on beside the softmax.
                products = plgpu.wgmma_accumulator_load(logits, wait_n=1)
                plgpu.barrier_arrive(self.barriers["key_free"].at[stage])
                found = self.softmax.update(
                    products, row_max, row_sum, partial(keys.mask.window, n)
                )
                if self.config.tiles.lazy_rescale:
                    # Nobody reads this. Without a store that needs the weights, ptxas moves the
                    # wait for the products to before the softmax.
                    self.smem["sums"].at[self.warpgroup][...] = found[1]
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(self.barriers["value_free"].at[before])
                return found

            shape = plgpu.ACC((ROWS, self.config.tiles.key), jnp.float32)
            for ref, x in zip(results, pl.run_scoped(multiply, shape), strict=True):
                ref[...] = x

        acc, row_max, row_sum, correction, weights = pl.run_state(beside)(
            (plgpu.ACC.init(acc), row_max, row_sum, row_max, weights)
        )
        return row_max, row_sum, self.softmax.rescale(acc, correction), weights

    def _wait_for_values(self, keys: _Keys, n: Array) -> None:
        """Waits until the ``n``-th tile's values are there, and zeroes those of padding."""
        stage = self._stage(keys, n)
        plgpu.barrier_wait(self.barriers["value"].at[stage])
        if not keys.zeroes_padding:
            return
        spec, (first_key, _) = self.config.spec, keys.tile.key_range(n)

        @pl.when(first_key >= spec.first_key)
        def zero():
            values = self.smem["value"].at[stage]
            zero_values(self.refs, values, keys.tile.batch_row, first_key, spec)

    def _last_values(self, keys: _Keys, acc: Array, weights: Array) -> Array:
        """Adds the product with the values of the last tile of keys."""
        last = keys.tile.num_key_tiles - 1
        stage = self._stage(keys, last)

        def multiply(acc):
            self._wait_for_values(keys, last)
            plgpu.wgmma(acc, weights, self.smem["value"].at[stage])

        acc = pl.run_state(multiply)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(self.barriers["value_free"].at[stage])
        return acc

    def _stage(self, keys: _Keys, n: int | Array) -> Array:
        """The stage of the ``n``-th tile of keys."""
        return lax.rem(keys.used + n, jnp.int32(self.config.tiles.slots))

    def _free_queries(self, stage: Array) -> None:
        """Lets the producer fetch the next queries, unless results go where these are."""
        if not self.config.out_in_query_smem:
            plgpu.barrier_arrive(self.barriers["query_free"].at[stage])
