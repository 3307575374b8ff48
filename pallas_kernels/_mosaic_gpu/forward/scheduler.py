"""Which tiles of queries a program of the forward kernel takes, and which keys these tiles see."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._kernels import ForwardInputs
from pallas_kernels._mosaic_gpu.forward.padding import (
    has_padding,
    padding_operands,
    zeroes_in_kernel,
)
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._mosaic_gpu.tiles import MOSAIC_SINKS, MosaicTiles
from pallas_kernels._spec import Spec
from pallas_kernels._tile_ranges import fetched_sink_count, key_span

LONG_WINDOW = 2048
"""Window from which on packed documents have their longest tiles first. On an H100 that took up to
4% off launches at 4095 and without a window, and added 3% at 1000, where tiles hardly differ."""


def sees_all(spec: Spec, inputs: ForwardInputs, rows: tuple[int, int]) -> bool:
    """Whether every query of a launch sees every key, so that no tile needs a mask."""
    one_sequence = not inputs.start.ndim and inputs.end is None
    if spec.window is not None or not one_sequence or len(inputs.runs) > 1:
        return False
    (run,) = inputs.runs
    return run.offset + run.key.shape[1] <= rows[0] + 1


class TileScheduler:
    """A launch over the queries ``rows``, whose tiles so many ``programs`` share.

    A warpgroup has `ROWS` rows of a tile: ``positions_per_warpgroup`` positions of each of
    ``tiles.heads`` heads of a group, one head after the other. ``operands`` are the arrays that
    the scheduler reads. ``sees_all`` says that every query sees every key.
    """

    def __init__(
        self,
        spec: Spec,
        inputs: ForwardInputs,
        rows: tuple[int, int],
        tiles: MosaicTiles,
        programs: int,
    ):
        query, runs, sinks = inputs.query, inputs.runs, inputs.sinks
        start, end = inputs.start, inputs.end
        batch, length, heads, _ = query.shape
        self.spec, self.rows, self.tiles = spec, rows, tiles
        self.runs = tuple((run.offset, run.key.shape[1]) for run in runs)
        self.positions_per_warpgroup = ROWS // tiles.heads
        self.positions_per_tile = tiles.positions
        self.query_tiles = pl.cdiv(rows[1] - rows[0], self.positions_per_tile)
        self.head_tiles = heads // tiles.heads
        self.group = heads // runs[0].key.shape[2]
        self.num_tiles = self.query_tiles * self.head_tiles * batch
        self.grid = min(programs, self.num_tiles)
        self.packed = start.ndim > 0
        self.has_ends_by_row = end is not None and end.ndim > 0
        self.has_halo = any(run.offset for run in runs)
        self.sees_all = sees_all(spec, inputs, rows)
        # The sinks of the shard itself are in this run, if it is here.
        offsets = [run.offset for run in runs]
        self.own = offsets.index(spec.first_key) if spec.first_key in offsets else len(runs) - 1
        self.num_sinks = spec.sinks_in(offsets[self.own])
        self.num_fetched_sinks = 0 if sinks is None else sinks.key.shape[1]
        # Without a window the sinks are among the keys that every query sees anyway.
        windowed = spec.window is not None and (self.num_sinks or sinks is not None)
        self.sink_tile = MOSAIC_SINKS if windowed else 0
        self.operands: dict[str, Any] = {
            "start": self._by_rows(start, batch, length),
            "runs": [(run.key, run.value) for run in runs],
        }
        if end is not None:
            self.operands["end"] = self._by_rows(end, batch, length)
        has_own_keys = spec.first_key in offsets
        self.zeroes_padding = has_own_keys and zeroes_in_kernel(spec, start, tiles)
        if self.zeroes_padding:
            self.operands |= padding_operands(start, spec.first_key, tiles)
        self.longest_first = self.packed and (spec.window is None or spec.window >= LONG_WINDOW)
        if self.longest_first:
            self.operands["order"] = self._longest_first(start, end)
        if sinks is not None:
            pad = ((0, 0), (0, -self.num_fetched_sinks % self.sink_tile), (0, 0), (0, 0))
            # Fetched sinks hold values of the keys' dtype, so this cast loses nothing.
            self.operands["sinks"] = tuple(jnp.pad(x.astype(query.dtype), pad) for x in sinks)

    def _by_rows(self, bounds: Array, batch: int, length: int) -> Array:
        """[B, warpgroups, ROWS] starts or ends of the rows of each warpgroup; [1, 1, 1] if one."""
        if not bounds.ndim:
            return bounds.reshape(1, 1, 1)
        positions = self.positions_per_warpgroup
        bounds = jnp.pad(bounds, ((0, 0), (0, -length % self.positions_per_tile)), mode="edge")
        bounds = bounds.reshape(batch, -1, 1, positions)
        bounds = jnp.broadcast_to(bounds, (*bounds.shape[:2], self.tiles.heads, positions))
        return bounds.reshape(batch, -1, ROWS)

    def _longest_first(self, start: Array, end: Array | None) -> Array:
        """[B * tiles] numbers of the tiles of queries, those that see the most keys first.

        Documents make tiles differ, so that programs with equal numbers of tiles have unequal
        shares of the work. In this order the tiles that programs take at a time are alike.
        """
        tile = jnp.arange(self.query_tiles, dtype=jnp.int32)
        first = self.rows[0] + tile * self.positions_per_tile
        last = jnp.minimum(first + self.positions_per_tile, self.rows[1]) - 1
        last_end = end if end is None or not end.ndim else end[:, last]
        keys = jnp.zeros((start.shape[0], self.query_tiles), jnp.int32)
        for offset, length in self.runs:
            low, high = key_span(
                first, last, start[:, first], self.spec.window,
                offset=offset, length=length, last_end=last_end,
            )  # fmt: skip
            keys += high - low + 1
        return jnp.argsort(-keys.reshape(-1), stable=True).astype(jnp.int32)

    def num_work_tiles(self) -> Array:
        """How many tiles this program takes."""
        left = self.num_tiles - lax.axis_index("program")
        return lax.div(left + self.grid - 1, jnp.int32(self.grid))

    def work_tile(self, refs, number) -> "WorkTile":
        """The ``number``-th tile of this program."""
        return WorkTile(self, refs, lax.axis_index("program") + number * self.grid)


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
        has_padding: whether there is padding in its tiles of own keys, where the kernel zeroes it.
    """

    def __init__(self, scheduler: TileScheduler, refs, index):
        self.scheduler = scheduler
        heads, queries = jnp.int32(scheduler.head_tiles), jnp.int32(scheduler.query_tiles)
        if scheduler.sees_all:
            self.query_tile, index = lax.rem(index, queries), lax.div(index, queries)
            self.head_tile, self.batch_row = lax.rem(index, heads), lax.div(index, heads)
        else:
            self.head_tile, index = lax.rem(index, heads), lax.div(index, heads)
            if scheduler.longest_first:
                index = refs["order"][index]
            self.query_tile = lax.rem(index, queries)
            if not scheduler.longest_first:
                self.query_tile = scheduler.query_tiles - 1 - self.query_tile
            self.batch_row = lax.div(index, queries)
        self.first_head = self.head_tile * scheduler.tiles.heads
        self.kv_head = lax.div(self.first_head, jnp.int32(scheduler.group))
        self.refs = refs
        first = self.first_position(0)
        last = jnp.minimum(first + scheduler.positions_per_tile, scheduler.rows[1]) - 1
        self.start = refs["start"][0, 0, 0]
        if scheduler.packed:
            self.start = refs["start"][self.batch_row, self.row_group(0), 0]
        spec, key_tile = scheduler.spec, scheduler.tiles.key
        self.end = None
        if scheduler.has_ends_by_row:
            last_group = self.row_group(scheduler.tiles.warpgroups - 1)
            self.end = refs["end"][self.batch_row, last_group, ROWS - 1]
        elif "end" in refs:
            self.end = refs["end"][0, 0, 0]
        self.begins_in_eights, self.key_tiles_of_runs = [], []
        for offset, length in scheduler.runs:
            low, high = key_span(
                first, last, self.start, spec.window,
                offset=offset, length=length, last_end=self.end,
            )  # fmt: skip
            begin = lax.div(low, jnp.int32(8))
            self.begins_in_eights.append(begin)
            count = lax.div(high - begin * 8 + key_tile, jnp.int32(key_tile))
            self.key_tiles_of_runs.append(jnp.where(high < low, 0, count))
        self.num_key_tiles = sum(self.key_tiles_of_runs[1:], self.key_tiles_of_runs[0])
        if scheduler.zeroes_padding:
            own = scheduler.own
            eights = self.key_tiles_of_runs[own] * (key_tile // 8)
            begin = self.begins_in_eights[own]
            self.has_padding = has_padding(refs, self.batch_row, begin, eights)
        if scheduler.sink_tile:
            self._find_sinks(last)

    def _find_sinks(self, last):
        scheduler, spec, own = self.scheduler, self.scheduler.spec, self.scheduler.own
        self.num_own_sink_tiles = jnp.int32(0)
        if scheduler.num_sinks:
            start = self.start - spec.first_key if spec.lookahead else self.start
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

    def row_group(self, warpgroup):
        """Number of the positions that a warpgroup has, counted from the shard's first ones."""
        first = self.scheduler.rows[0] // self.scheduler.positions_per_warpgroup
        return first + self.query_tile * self.scheduler.tiles.warpgroups + warpgroup

    def first_position(self, warpgroup):
        """Position of a warpgroup's first query, a multiple of 8."""
        return self.row_group(warpgroup) * (self.scheduler.positions_per_warpgroup // 8) * 8

    def fetched_tile(self, run: int, n):
        """Which tile of keys of a run, counted from the first one that is seen, comes ``n``-th."""
        return self.key_tiles_of_runs[run] - 1 - n if self.scheduler.sees_all else n

    def key_range(self, n):
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

    def first_key_of_all(self, warpgroup):
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

    def first_end(self, warpgroup):
        """Where the sequence of a warpgroup's first query ends; None: no row has an end."""
        if not self.scheduler.has_ends_by_row:
            return None
        return self.refs["end"][self.batch_row, self.row_group(warpgroup), 0]

    def is_unmasked(self, first_query, low, n, first_end=None):
        """Every query from ``first_query`` on sees every key of the ``n``-th tile of keys.

        ``low`` and ``first_end`` are what `first_key_of_all` and `first_end` say of the warpgroup.
        """
        first, stop = self.key_range(n)
        causal = first_query + 1
        if first_end is not None:
            causal = jnp.minimum(causal, first_end)
        stop = jnp.minimum(stop, causal) if self.scheduler.has_halo else causal
        unmasked = first + self.scheduler.tiles.key <= stop
        return unmasked if low is None else unmasked & (first >= low)

    def sink_range(self, n):
        """(position of the first key, end, whether fetched) of the ``n``-th tile of sinks."""
        size = self.scheduler.sink_tile
        fetched = n >= self.num_own_sink_tiles
        begin = stop = jnp.int32(0)
        if self.scheduler.num_sinks:
            begin, stop = self.own_sinks_begin_in_eights * 8 + n * size, self.own_sinks_end
            if first_key := self.scheduler.spec.first_key:
                begin, stop = begin + first_key, stop + first_key
        if self.scheduler.num_fetched_sinks:
            fetched_begin = self.crossing + (n - self.num_own_sink_tiles) * size
            begin = jnp.where(fetched, fetched_begin, begin)
            stop = jnp.where(fetched, self.crossing + self.scheduler.num_fetched_sinks, stop)
        return begin, stop, fetched
