"""Which tiles of queries a program of a Mosaic GPU kernel takes, and which keys these see."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._mosaic_gpu.tiles import MOSAIC_SINKS, MosaicTiles
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts
from pallas_kernels._tile_ranges import fetched_sink_count, key_span


class Walk:
    """A launch over the queries ``rows``, by so many programs.

    A warpgroup has ``half`` positions of ``tiles.heads`` heads of a group, head by head; a tile
    has as many for each warpgroup. ``arrays`` are what the walk reads.
    """

    def __init__(
        self,
        spec: Spec,
        query: Array,
        runs: tuple[KeyRun, ...],
        sinks: SinkRun | None,
        start: Starts,
        rows: tuple[int, int],
        tiles: MosaicTiles,
        programs: int,
    ):
        batch, length, heads, _ = query.shape
        self.spec, self.rows, self.tiles = spec, rows, tiles
        self.runs = tuple((run.offset, run.key.shape[1]) for run in runs)
        self.half = ROWS // tiles.heads
        self.size = tiles.positions
        self.blocks = -(-(rows[1] - rows[0]) // self.size)
        self.head_blocks = heads // tiles.heads
        self.group = heads // runs[0].key.shape[2]
        self.num_tiles = self.blocks * self.head_blocks * batch
        self.grid = min(programs, self.num_tiles)
        self.packed = start.ndim > 0
        self.has_halo = any(run.offset for run in runs)
        self.num_sinks = spec.sinks_in(runs[-1].offset)
        self.fetched = 0 if sinks is None else sinks.key.shape[1]
        windowed = spec.window is not None and (self.num_sinks or sinks is not None)
        self.sink_rows = MOSAIC_SINKS if windowed else 0
        if self.packed:
            # By warpgroups: the starts of their rows, which repeat head by head.
            start = jnp.pad(start, ((0, 0), (0, -length % self.size)), mode="edge")
            start = start.reshape(batch, -1, 1, self.half)
            start = jnp.broadcast_to(start, (*start.shape[:2], tiles.heads, self.half))
            start = start.reshape(batch, -1, ROWS)
        else:
            start = start.reshape(1, 1, 1)
        self.arrays: dict[str, Any] = {
            "start": start,
            "runs": [(run.key, run.value) for run in runs],
        }
        if sinks is not None:
            pad = ((0, 0), (0, -self.fetched % self.sink_rows), (0, 0), (0, 0))
            # Fetched sinks hold values of the keys' dtype, so this cast loses nothing.
            self.arrays["sinks"] = tuple(jnp.pad(x.astype(query.dtype), pad) for x in sinks)

    def items(self) -> Array:
        """How many tiles this program takes."""
        left = self.num_tiles - lax.axis_index("program")
        return lax.div(left + self.grid - 1, jnp.int32(self.grid))

    def tile(self, refs, number) -> "Tile":
        """The ``number``-th tile of this program."""
        return Tile(self, refs, lax.axis_index("program") + number * self.grid)


class Tile:
    """Where a tile's queries and keys are.

    Heads that share keys come one after the other, then the tiles, of which the last ones, which
    see most under a causal mask, come first. Keys are fetched from multiples of 8 on.
    """

    def __init__(self, walk: Walk, refs, index):
        self.walk = walk
        self.head_block = lax.rem(index, jnp.int32(walk.head_blocks))
        index = lax.div(index, jnp.int32(walk.head_blocks))
        self.block = walk.blocks - 1 - lax.rem(index, jnp.int32(walk.blocks))
        self.row = lax.div(index, jnp.int32(walk.blocks))
        self.first_head = self.head_block * walk.tiles.heads
        self.kv_head = lax.div(self.first_head, jnp.int32(walk.group))
        self.refs = refs
        first = self.begin(0)
        last = jnp.minimum(first + walk.size, walk.rows[1]) - 1
        self.start = refs["start"][0, 0, 0]
        if walk.packed:
            self.start = refs["start"][self.row, self.group(0), 0]
        spec, key = walk.spec, walk.tiles.key
        self.eighths, self.counts = [], []
        for offset, length in walk.runs:
            low, high = key_span(first, last, self.start, spec.window, offset=offset, length=length)
            eighth = lax.div(low, jnp.int32(8))
            self.eighths.append(eighth)
            count = lax.div(high - eighth * 8 + key, jnp.int32(key))
            self.counts.append(jnp.where(high < low, 0, count))
        self.count = sum(self.counts[1:], self.counts[0])
        if walk.sink_rows:
            self._find_sinks(last)

    def _find_sinks(self, last):
        walk, spec = self.walk, self.walk.spec
        self.own_sink_count = jnp.int32(0)
        if walk.num_sinks:
            begin = jnp.maximum(self.start, 0)
            length = walk.runs[-1][1]
            stop = jnp.minimum(self.start + spec.num_sinks, self.eighths[-1] * 8)
            self.sink_stop = jnp.minimum(stop, length)
            self.sink_eighth = lax.div(jnp.minimum(begin, length), jnp.int32(8))
            wanted = self.sink_stop - self.sink_eighth * 8
            count = lax.div(wanted + walk.sink_rows - 1, jnp.int32(walk.sink_rows))
            self.own_sink_count = jnp.where(self.sink_stop > begin, count, 0)
        self.sink_count = self.own_sink_count
        if walk.fetched:
            assert spec.window is not None
            crossing = self.refs["start"][self.row if walk.packed else 0, 0, 0]
            self.crossing = crossing
            slots = fetched_sink_count(last, self.start, crossing, spec.window, length=walk.fetched)
            count = lax.div(slots + walk.sink_rows - 1, jnp.int32(walk.sink_rows))
            self.sink_count = self.own_sink_count + count

    def group(self, consumer):
        """Number of a warpgroup's rows, counted from the shard's first."""
        first = self.walk.rows[0] // self.walk.half
        return first + self.block * self.walk.tiles.warpgroups + consumer

    def begin(self, consumer):
        """Position of a warpgroup's first query, a multiple of 8."""
        return self.group(consumer) * (self.walk.half // 8) * 8

    def place(self, n):
        """Position of the first key of the ``n``-th tile of keys, and the end of its run."""
        begin = stop = None
        passed: Any = 0
        for (offset, length), eighth, count in zip(
            self.walk.runs, self.eighths, self.counts, strict=True
        ):
            here = eighth * 8 + offset - passed * self.walk.tiles.key
            end = jnp.int32(offset + length)
            begin = here if begin is None else jnp.where(n >= passed, here, begin)
            stop = end if stop is None else jnp.where(n >= passed, end, stop)
            passed = passed + count
        return begin + n * self.walk.tiles.key, stop

    def clear_from(self, consumer):
        """First position that windows of all queries of the warpgroup reach; None: any."""
        walk = self.walk
        low = None
        if walk.spec.window is not None:
            last = jnp.minimum(self.begin(consumer) + walk.half, walk.rows[1]) - 1
            low = last - walk.spec.window
        if walk.packed:
            start = self.refs["start"][self.row, self.group(consumer), ROWS - 1]
            low = start if low is None else jnp.maximum(low, start)
        return low

    def is_clear(self, begin, low, n):
        """Every query from ``begin`` on sees every key of the ``n``-th tile in its window.

        ``low`` is that of ``clear_from``.
        """
        first, stop = self.place(n)
        stop = jnp.minimum(stop, begin + 1) if self.walk.has_halo else begin + 1
        clear = first + self.walk.tiles.key <= stop
        return clear if low is None else clear & (first >= low)

    def place_of_sinks(self, n):
        """(position of the first key, end, whether fetched) of the ``n``-th tile of sinks."""
        size = self.walk.sink_rows
        fetched = n >= self.own_sink_count
        begin = stop = jnp.int32(0)
        if self.walk.num_sinks:
            begin, stop = self.sink_eighth * 8 + n * size, self.sink_stop
        if self.walk.fetched:
            far = self.crossing + (n - self.own_sink_count) * size
            begin = jnp.where(fetched, far, begin)
            stop = jnp.where(fetched, self.crossing + self.walk.fetched, stop)
        return begin, stop, fetched
