"""The online softmax of the forward kernel, and the masks of its tiles of keys.

The softmax is in base 2. It keeps ``LOWEST`` instead of -inf as the maximum of a row that has seen
no key, so that no difference of infinities arises.

With `MosaicTiles.lazy_rescale`, the number that exponents are relative to is not always the row's
maximum: it grows only by more than `SLACK`, so that sums are hardly ever rescaled (as in
FlashAttention-4); and each thread sums up its own columns until the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._logits import cap_logits
from pallas_kernels._masks import (
    in_range,
    key_ranges,
    range_length,
    sees,
    sees_fetched_sink,
    sees_sink_before,
    sees_without_fetched_sinks,
)
from pallas_kernels._mosaic_gpu.forward.config import ForwardConfig
from pallas_kernels._mosaic_gpu.forward.work_tile import WorkTile
from pallas_kernels._mosaic_gpu.primitives import (
    COLUMN,
    MATRIX,
    ROWS,
    broadcast_column,
    fold_columns,
    load_as,
    not_all_one,
)

SLACK = 8.0
"""Powers of two that weights may grow by: they fit float16, and their sums float32."""


class TileMask:
    """Masks of the logits of a warpgroup's queries with tiles of keys.

    Args:
        config: static settings.
        refs: arrays in global memory.
        tile: of queries.
        warpgroup: which of the consumers has the queries.
        starts: of its rows, where documents make them differ.
    """

    def __init__(
        self,
        config: ForwardConfig,
        refs: dict[str, Any],
        tile: WorkTile,
        warpgroup: Array,
        starts: Any | None,
    ):
        self.config, self.tile = config, tile
        self.first_query = tile.first_position(warpgroup)
        self.first_key_of_all = first_key_of_all(tile, warpgroup, starts)
        self.starts = tile.start if starts is None else load_as(starts, COLUMN)
        self.first_end = self.ends = None
        if config.scheduler.has_ends_by_row:
            ends = refs["end"].at[tile.batch_row, tile.row_group(warpgroup)]
            self.first_end, self.ends = ends[0], load_as(ends, COLUMN)

    def first(self, logits: Array) -> Array:
        """`window` of the tile of keys that comes first."""
        scheduler = self.config.scheduler
        if not scheduler.sees_all:
            return self.window(jnp.int32(0), logits)
        (_, length), size = scheduler.runs[0], self.config.tiles.key
        if length % size == 0:
            return logits
        first_key, stop = self.tile.key_range(0)
        j = plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 1, layout=MATRIX)
        return jnp.where(j < stop - first_key, logits, -jnp.inf)

    def window(self, n: Array, logits: Array) -> Array:
        """Logits with the ``n``-th tile of keys, -inf where a query does not see a key."""
        if self.config.scheduler.sees_all:
            return logits
        unmasked = self.tile.is_unmasked(self.first_query, self.first_key_of_all, n, self.first_end)
        mask = self._packed_window if self.config.scheduler.packed else self._window
        return lax.cond(unmasked, lambda x: x, partial(mask, n), logits)

    def sinks(self, n: Array, logits: Array) -> Array:
        """Logits with the ``n``-th tile of sinks, -inf where a query does not see a key."""
        first_key, stop, fetched = self.tile.sink_range(n)
        i, j, start = self._positions(logits.shape[1], first_key)
        spec = self.config.spec

        def own(logits):
            seen = sees_sink_before(i, j, start, spec.num_sinks, stop)
            return jnp.where(seen, logits, -jnp.inf)

        def of_other_shards(logits):
            seen = sees_fetched_sink(
                i, j, start, spec.window, spec.num_sinks, first_key=spec.first_key
            )
            return jnp.where(seen & (j < stop), logits, -jnp.inf)

        if not self.config.has_fetched_sinks:
            return own(logits)
        return lax.cond(fetched, of_other_shards, own, logits)

    def _window(self, n: Array, logits: Array) -> Array:
        scheduler = self.config.scheduler
        first_key, stop = self.tile.key_range(n)
        i, j, start = self._positions(self.config.tiles.key, first_key)
        spec, rule = self.config.spec, sees
        if scheduler.has_halo:
            rule = partial(sees_without_fetched_sinks, first_key=spec.first_key)
        seen = rule(i, j, start, spec.window, scheduler.num_sinks, packed=False)
        if scheduler.has_halo:
            seen &= j < stop
        return jnp.where(seen, logits, -jnp.inf)

    def _packed_window(self, n: Array, logits: Array) -> Array:
        """As `_window`, by ranges of keys, which rows compute once for all columns.

        On an H100 that took 5 to 14% off the forward pass of packed documents.
        """
        scheduler, spec, size = self.config.scheduler, self.config.spec, self.config.tiles.key
        first_key, stop_of_run = self.tile.key_range(n)
        i = self._row_of_head(plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=COLUMN))
        ranges = key_ranges(
            i + self.first_query, self.starts, spec.window, scheduler.num_sinks,
            end=self.ends, first_key=spec.first_key if scheduler.has_halo else None,
        )  # fmt: skip
        j = plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 1, layout=MATRIX) + first_key

        def holds(first, stop):
            stop = jnp.minimum(stop, stop_of_run) if scheduler.has_halo else stop
            length = range_length(first, stop)
            return in_range(j, broadcast_column(first, size), broadcast_column(length, size))

        seen = holds(*ranges[0])
        for other in ranges[1:]:
            seen |= holds(*other)
        return jnp.where(seen, logits, -jnp.inf)

    def _row_of_head(self, row: Array) -> Array:
        """The rows, counted from the first one of their head."""
        if self.config.tiles.heads == 1:
            return row
        positions = self.config.scheduler.positions_per_warpgroup
        return lax.bitwise_and(row, jnp.int32(positions - 1))

    def _positions(self, size: int, first_key: Array) -> tuple[Array, Array, Array]:
        """(i, j, start) of a matrix of logits."""
        i = self._row_of_head(plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 0, layout=MATRIX))
        j = plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 1, layout=MATRIX)
        packed = self.config.scheduler.packed
        start = broadcast_column(self.starts, size) if packed else self.starts
        return i + self.first_query, j + first_key, start


def first_key_of_all(tile: WorkTile, warpgroup: int | Array, starts: Any | None) -> Array | None:
    """First position that the windows of all queries of a warpgroup reach; None: any.

    ``starts`` are those of the warpgroup's rows, where documents make them differ.
    """
    scheduler = tile.scheduler
    low = None
    if scheduler.spec.window is not None:
        last = tile.first_position(warpgroup) + scheduler.positions_per_warpgroup
        low = jnp.minimum(last, scheduler.rows[1]) - 1 - scheduler.spec.window
    if starts is not None:
        last_start = starts[ROWS - 1]
        low = last_start if low is None else jnp.maximum(low, last_start)
    return low


class OnlineSoftmax:
    """One step of the softmax for a tile of keys, and what follows for the accumulator."""

    def __init__(self, config: ForwardConfig):
        self.spec, self.dtype = config.spec, config.dtype
        self.lazy_rescale, self.value_dim = config.tiles.lazy_rescale, config.value_dim

    def update(
        self, products: Array, row_max: Array, row_sum: Array, mask: Callable[[Array], Array]
    ) -> tuple[Array, Array, Array, Array]:
        """(row_max, row_sum, the factor of what was summed up before, weights)."""
        logits, factor, _ = cap_logits(self.spec, products)
        logits = mask(logits)
        if self.lazy_rescale:
            peak = fold_columns(jnp.maximum, logits).max(axis=1) * factor
            new_max = jnp.where(peak > row_max + SLACK, peak, row_max)
        else:
            new_max = jnp.maximum(row_max, logits.max(axis=1) * factor)
        correction = jnp.exp2(row_max - new_max)
        weights = jnp.exp2(logits * factor - broadcast_column(new_max, logits.shape[1]))
        if self.lazy_rescale:
            width = row_sum.shape[1]
            row_sum = row_sum * broadcast_column(correction, width) + fold_columns(jnp.add, weights)
        else:
            row_sum = row_sum * correction + weights.sum(axis=1)
        return new_max, row_sum, correction, weights.astype(self.dtype)

    def rescale(self, acc: Array, correction: Array) -> Array:
        """The accumulator times the factor of its rows; lazily, only where one is not 1."""

        def multiply(acc: Any):
            return acc * broadcast_column(correction, self.value_dim)

        if not self.lazy_rescale:
            return multiply(acc)
        return lax.cond(not_all_one(correction), multiply, lambda acc: acc, acc)
