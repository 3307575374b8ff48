"""Which keys a tile of queries of the forward kernel sees: the producer finds that out."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._mosaic_gpu.forward.padding import has_padding
from pallas_kernels._mosaic_gpu.forward.scheduler import TileScheduler
from pallas_kernels._mosaic_gpu.forward.work_tile import SinkTiles, WorkTile
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._sink_ranges import fetched_sink_count
from pallas_kernels._spec import minus
from pallas_kernels._tile_ranges import key_span


class TileFinder:
    """Finds the tiles of a launch by their numbers.

    Tiles of heads come one after the other, then tiles of queries, then rows of the batch. The
    last queries, which see most under a causal mask, come first; where ``longest_first``, the tiles
    of all rows that see most. Where all queries see all keys, tiles of queries come first, so that
    the keys of few heads are in use, which the L2 cache holds; and the last tile of keys comes
    first, so that no later one has rows beyond the last key.

    Args:
        scheduler: which tiles there are.
        refs: arrays in global memory.
    """

    def __init__(self, scheduler: TileScheduler, refs: dict[str, Any]):
        self.scheduler, self.refs = scheduler, refs

    def of_program(self, number: Array) -> WorkTile:
        """The ``number``-th tile of the program that asks."""
        return self.find(self.scheduler.work_tile(number))

    def find(self, index: Array) -> WorkTile:
        """The tile that has this number in the launch."""
        scheduler = self.scheduler
        batch_row, head_tile, query_tile = self._coordinates(index)
        first = scheduler.first_position(query_tile, 0)
        last = jnp.minimum(first + scheduler.positions_per_tile, scheduler.rows[1]) - 1
        start, end = self._bounds(batch_row, query_tile)
        begins_in_eights, key_tiles = self._keys(first, last, start, end)
        own, padding, sinks = scheduler.own, None, None
        if scheduler.zeroes_padding:
            begin, count = begins_in_eights[own] * 8, key_tiles[own] * scheduler.tiles.key
            padding = has_padding(self.refs, batch_row, begin, count).astype(jnp.int32)
        if scheduler.sink_tile:
            sinks = self._sinks(batch_row, start, last, begins_in_eights[own] * 8)
        return WorkTile(
            scheduler, batch_row, head_tile, query_tile, start, end,
            begins_in_eights, key_tiles, sinks, padding,
        )  # fmt: skip

    def _coordinates(self, index: Array) -> tuple[Array, Array, Array]:
        """(row of the batch, tile of heads, tile of positions)."""
        scheduler = self.scheduler
        heads, queries = jnp.int32(scheduler.head_tiles), jnp.int32(scheduler.query_tiles)
        if scheduler.sees_all:
            query_tile, index = lax.rem(index, queries), lax.div(index, queries)
            return lax.div(index, heads), lax.rem(index, heads), query_tile
        head_tile, index = lax.rem(index, heads), lax.div(index, heads)
        if scheduler.longest_first:
            index = self.refs["order"][index]
        query_tile = lax.rem(index, queries)
        if not scheduler.longest_first:
            query_tile = scheduler.query_tiles - 1 - query_tile
        return lax.div(index, queries), head_tile, query_tile

    def _bounds(self, batch_row: Array, query_tile: Array) -> tuple[Array, Array | None]:
        """Where the first query's sequence starts, and the last query's ends."""
        scheduler, refs = self.scheduler, self.refs
        start, end = refs["start"][0, 0, 0], None
        if scheduler.packed:
            start = refs["start"][batch_row, scheduler.row_group(query_tile, 0), 0]
        if scheduler.has_ends_by_row:
            last_group = scheduler.row_group(query_tile, scheduler.tiles.warpgroups - 1)
            end = refs["end"][batch_row, last_group, ROWS - 1]
        elif "end" in refs:
            end = refs["end"][0, 0, 0]
        return start, end

    def _keys(
        self, first: Array, last: Array, start: Array, end: Array | None
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """(begins in eights, tiles) of the keys in the windows of ``first..last``, by run."""
        scheduler, key_tile = self.scheduler, self.scheduler.tiles.key
        begins_in_eights, key_tiles = [], []
        for offset, length in scheduler.runs:
            low, high = key_span(
                first, last, start, scheduler.spec.window,
                offset=offset, length=length, last_end=end,
            )  # fmt: skip
            begin = lax.div(low, jnp.int32(8))
            begins_in_eights.append(begin)
            count = lax.div(high - begin * 8 + key_tile, jnp.int32(key_tile))
            key_tiles.append(jnp.where(high < low, 0, count))
        return tuple(begins_in_eights), tuple(key_tiles)

    def _sinks(self, batch_row: Array, start: Array, last: Array, own_begin: Array) -> SinkTiles:
        """The tiles of sinks, the shard's own and fetched ones, that queries up to ``last`` see.

        ``own_begin`` is the first of the shard's own keys that is fetched for their windows.
        """
        scheduler, spec = self.scheduler, self.scheduler.spec
        size = jnp.int32(scheduler.sink_tile)
        begin_in_eights = own_end = num_own = crossing = jnp.int32(0)
        if scheduler.num_sinks:
            first = minus(start, spec.first_key)
            begin, length = jnp.maximum(first, 0), scheduler.runs[scheduler.own][1]
            own_end = jnp.minimum(jnp.minimum(first + spec.num_sinks, own_begin), length)
            begin_in_eights = lax.div(jnp.minimum(begin, length), jnp.int32(8))
            count = lax.div(own_end - begin_in_eights * 8 + size - 1, size)
            num_own = jnp.where(own_end > begin, count, 0)
        num = num_own
        if scheduler.num_fetched_sinks:
            assert spec.window is not None
            crossing = self.refs["start"][batch_row if scheduler.packed else 0, 0, 0]
            slots = fetched_sink_count(
                last, start, crossing, spec.window,
                length=scheduler.num_fetched_sinks, first_key=spec.first_key,
            )  # fmt: skip
            num = num_own + lax.div(slots + size - 1, size)
        return SinkTiles(begin_in_eights, own_end, num_own, num, crossing)
