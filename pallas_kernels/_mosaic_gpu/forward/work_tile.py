"""A tile of queries of the forward kernel: where it is, and which tiles of keys it sees.

Each warpgroup of a program computes these numbers by itself when it begins a tile.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._mosaic_gpu.forward.padding import has_padding
from pallas_kernels._mosaic_gpu.forward.scheduler import TileScheduler
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._sink_ranges import fetched_sink_count
from pallas_kernels._spec import minus, plus
from pallas_kernels._tile_ranges import key_span


class WorkTile:
    """A tile of queries: its row of the batch, heads, positions, and the keys that it sees.

    Tiles of heads come one after the other, then tiles of queries, then rows of the batch. The
    last queries, which see most under a causal mask, come first; where ``longest_first``, the tiles
    of all rows that see most. Where all queries see all keys, tiles of queries come first, so that
    the keys of few heads are in use, which the L2 cache holds; and the last tile of keys comes
    first, so that no later one has rows beyond the last key.

    TMA fetches keys from multiples of 8 on, so a run's first key is counted in eights.

    Attributes:
        batch_row: row of the batch.
        head_tile: number of the tile of heads.
        first_head: its first query head.
        kv_head: the key/value head of all its heads.
        start: where the sequence of the tile's first query starts.
        end: where the sequence of the last query ends; None: no key is behind that.
        num_key_tiles: tiles of keys in the windows of its queries, in all runs.
        num_sink_tiles: tiles of sinks, the shard's own before the fetched ones.
        has_padding: whether its tiles of own keys hold padding, where the kernel zeroes that.
    """

    def __init__(self, scheduler: TileScheduler, refs: dict[str, Any], index: Array):
        self.scheduler, self.refs = scheduler, refs
        self._find_coordinates(index)
        first = self.first_position(0)
        last = jnp.minimum(first + scheduler.positions_per_tile, scheduler.rows[1]) - 1
        self._find_bounds()
        self._find_keys(first, last)
        if scheduler.zeroes_padding:
            count = self.key_tiles_of_runs[scheduler.own] * scheduler.tiles.key
            begin = self.begins_in_eights[scheduler.own] * 8
            self.has_padding = has_padding(refs, self.batch_row, begin, count)
        if scheduler.sink_tile:
            self._find_sinks(last)

    @classmethod
    def of_program(
        cls, scheduler: TileScheduler, refs: dict[str, Any], number: Array
    ) -> "WorkTile":
        """The ``number``-th tile of the program that asks."""
        return cls(scheduler, refs, lax.axis_index("program") + number * scheduler.grid)

    def _find_coordinates(self, index: Array) -> None:
        """From the number of the tile: its row of the batch, heads and positions."""
        scheduler = self.scheduler
        heads, queries = jnp.int32(scheduler.head_tiles), jnp.int32(scheduler.query_tiles)
        if scheduler.sees_all:
            self.query_tile, index = lax.rem(index, queries), lax.div(index, queries)
            self.head_tile, self.batch_row = lax.rem(index, heads), lax.div(index, heads)
        else:
            self.head_tile, index = lax.rem(index, heads), lax.div(index, heads)
            if scheduler.longest_first:
                index = self.refs["order"][index]
            self.query_tile = lax.rem(index, queries)
            if not scheduler.longest_first:
                self.query_tile = scheduler.query_tiles - 1 - self.query_tile
            self.batch_row = lax.div(index, queries)
        self.first_head = self.head_tile * scheduler.tiles.heads
        self.kv_head = lax.div(self.first_head, jnp.int32(scheduler.group))

    def _find_bounds(self) -> None:
        """Where the first query's sequence starts, and the last query's ends."""
        scheduler, refs = self.scheduler, self.refs
        self.start = refs["start"][0, 0, 0]
        if scheduler.packed:
            self.start = refs["start"][self.batch_row, self.row_group(0), 0]
        self.end = None
        if scheduler.has_ends_by_row:
            last_group = self.row_group(scheduler.tiles.warpgroups - 1)
            self.end = refs["end"][self.batch_row, last_group, ROWS - 1]
        elif "end" in refs:
            self.end = refs["end"][0, 0, 0]

    def _find_keys(self, first: Array, last: Array) -> None:
        """The tiles of keys, in each run, that the queries ``first..last`` see in their windows."""
        scheduler, key_tile = self.scheduler, self.scheduler.tiles.key
        self.begins_in_eights, self.key_tiles_of_runs = [], []
        for offset, length in scheduler.runs:
            low, high = key_span(
                first, last, self.start, scheduler.spec.window,
                offset=offset, length=length, last_end=self.end,
            )  # fmt: skip
            begin = lax.div(low, jnp.int32(8))
            self.begins_in_eights.append(begin)
            count = lax.div(high - begin * 8 + key_tile, jnp.int32(key_tile))
            self.key_tiles_of_runs.append(jnp.where(high < low, 0, count))
        self.num_key_tiles = sum(self.key_tiles_of_runs[1:], self.key_tiles_of_runs[0])

    def _find_sinks(self, last: Array) -> None:
        """The tiles of sinks, the shard's own and fetched ones, that queries up to ``last`` see."""
        scheduler, spec, own = self.scheduler, self.scheduler.spec, self.scheduler.own
        self.num_own_sink_tiles = jnp.int32(0)
        if scheduler.num_sinks:
            start = minus(self.start, spec.first_key)
            begin, length = jnp.maximum(start, 0), scheduler.runs[own][1]
            stop = jnp.minimum(start + spec.num_sinks, self.begins_in_eights[own] * 8)
            self.own_sinks_end = jnp.minimum(stop, length)
            self.own_sinks_begin_in_eights = lax.div(jnp.minimum(begin, length), jnp.int32(8))
            wanted = self.own_sinks_end - self.own_sinks_begin_in_eights * 8
            count = lax.div(wanted + scheduler.sink_tile - 1, jnp.int32(scheduler.sink_tile))
            self.num_own_sink_tiles = jnp.where(self.own_sinks_end > begin, count, 0)
        self.num_sink_tiles = self.num_own_sink_tiles
        if scheduler.num_fetched_sinks:
            assert spec.window is not None
            crossing = self.refs["start"][self.batch_row if scheduler.packed else 0, 0, 0]
            self.crossing = crossing
            slots = fetched_sink_count(
                last, self.start, crossing, spec.window,
                length=scheduler.num_fetched_sinks, first_key=spec.first_key,
            )  # fmt: skip
            count = lax.div(slots + scheduler.sink_tile - 1, jnp.int32(scheduler.sink_tile))
            self.num_sink_tiles = self.num_own_sink_tiles + count

    def row_group(self, warpgroup: int | Array) -> Array:
        """Number of the positions that a warpgroup has, counted from the shard's first ones."""
        first = self.scheduler.rows[0] // self.scheduler.positions_per_warpgroup
        return first + self.query_tile * self.scheduler.tiles.warpgroups + warpgroup

    def first_position(self, warpgroup: int | Array) -> Array:
        """Position of a warpgroup's first query, a multiple of 8."""
        return self.row_group(warpgroup) * (self.scheduler.positions_per_warpgroup // 8) * 8

    def fetched_tile(self, run: int, n: int | Array) -> int | Array:
        """Which tile of keys of a run, counted from the first one that is seen, comes ``n``-th."""
        return self.key_tiles_of_runs[run] - 1 - n if self.scheduler.sees_all else n

    def key_range(self, n: int | Array) -> tuple[Array, Array]:
        """Position of the first key of the ``n``-th tile of keys, and the end of its run."""
        n = self.fetched_tile(0, n)
        begin: Any = None
        stop: Any = None
        before: Any = 0
        for (offset, length), eights, count in zip(
            self.scheduler.runs, self.begins_in_eights, self.key_tiles_of_runs, strict=True
        ):
            of_run = eights * 8 + offset - before * self.scheduler.tiles.key
            end = jnp.int32(offset + length)
            begin = of_run if begin is None else jnp.where(n >= before, of_run, begin)
            stop = end if stop is None else jnp.where(n >= before, end, stop)
            before = before + count
        if self.end is not None and not self.scheduler.has_ends_by_row:
            stop = jnp.minimum(stop, self.end)
        return begin + n * self.scheduler.tiles.key, stop

    def first_key_of_all(self, warpgroup: int | Array) -> Array | None:
        """First position that the windows of all queries of the warpgroup reach; None: any."""
        scheduler = self.scheduler
        low = None
        if scheduler.spec.window is not None:
            last = self.first_position(warpgroup) + scheduler.positions_per_warpgroup
            last = jnp.minimum(last, scheduler.rows[1]) - 1
            low = last - scheduler.spec.window
        if scheduler.packed:
            start = self.refs["start"][self.batch_row, self.row_group(warpgroup), ROWS - 1]
            low = start if low is None else jnp.maximum(low, start)
        return low

    def first_end(self, warpgroup: int | Array) -> Array | None:
        """Where the sequence of a warpgroup's first query ends; None: no row has an end."""
        if not self.scheduler.has_ends_by_row:
            return None
        return self.refs["end"][self.batch_row, self.row_group(warpgroup), 0]

    def is_unmasked(
        self,
        first_query: int | Array,
        low: Array | None,
        n: int | Array,
        first_end: Array | None = None,
    ) -> Array:
        """Every query from ``first_query`` on sees every key of the ``n``-th tile of keys.

        ``low`` and ``first_end`` are what `first_key_of_all` and `first_end` say of the warpgroup.
        """
        first, stop = self.key_range(n)
        causal = first_query + 1
        if first_end is not None:
            causal = jnp.minimum(causal, first_end)
        end = jnp.minimum(stop, causal) if self.scheduler.has_halo else causal
        unmasked = first + self.scheduler.tiles.key <= end
        return unmasked if low is None else unmasked & (first >= low)

    def sink_range(self, n: int | Array) -> tuple[Array, Array, Array]:
        """(position of the first key, end, whether fetched) of the ``n``-th tile of sinks."""
        size = self.scheduler.sink_tile
        fetched = n >= self.num_own_sink_tiles
        begin = stop = jnp.int32(0)
        if self.scheduler.num_sinks:
            begin, stop = self.own_sinks_begin_in_eights * 8 + n * size, self.own_sinks_end
            begin, stop = (plus(x, self.scheduler.spec.first_key) for x in (begin, stop))
        if self.scheduler.num_fetched_sinks:
            fetched_begin = self.crossing + (n - self.num_own_sink_tiles) * size
            begin = jnp.where(fetched, fetched_begin, begin)
            stop = jnp.where(fetched, self.crossing + self.scheduler.num_fetched_sinks, stop)
        return begin, stop, fetched
