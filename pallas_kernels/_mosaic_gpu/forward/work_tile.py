"""A tile of queries of the forward kernel: where it is, and which tiles of keys it sees.

The producer finds these numbers (`tile_finder`), and hands them to the consumers through shared
memory: to read where documents begin takes a while, in which a consumer would compute nothing.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._mosaic_gpu.forward.scheduler import TileScheduler
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._spec import plus


class SinkTiles(NamedTuple):
    """The tiles of sinks that a tile of queries sees: the shard's own before the fetched ones.

    Attributes:
        own_begin_in_eights: row of the shard's first sink to fetch, divided by 8.
        own_end: row behind its last one.
        num_own: tiles of the shard's own sinks.
        num: of all sinks.
        crossing: where the sequence that crosses into the shard starts.
    """

    own_begin_in_eights: Array
    own_end: Array
    num_own: Array
    num: Array
    crossing: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WorkTile:
    """A tile of queries: its row of the batch, heads, positions, and the keys that it sees.

    TMA fetches keys from multiples of 8 on, so a run's first key is counted in eights.

    Attributes:
        scheduler: which tiles there are.
        batch_row: row of the batch.
        head_tile: number of the tile of heads.
        query_tile: number of the tile of positions.
        start: where the sequence of the tile's first query starts.
        end: where the sequence of the last query ends; None: no key is behind that.
        begins_in_eights: of each run, row of the first key to fetch, divided by 8.
        key_tiles_of_runs: of each run, tiles of keys in the windows of its queries.
        sinks: tiles of sinks; None where there are none.
        has_padding: 1 if its tiles of own keys hold padding, where the kernel zeroes that, else 0.
    """

    scheduler: TileScheduler = dataclasses.field(metadata={"static": True})
    batch_row: Array
    head_tile: Array
    query_tile: Array
    start: Array
    end: Array | None
    begins_in_eights: tuple[Array, ...]
    key_tiles_of_runs: tuple[Array, ...]
    sinks: SinkTiles | None
    has_padding: Array | None

    @classmethod
    def structure(cls, scheduler: TileScheduler) -> Any:
        """The tree of a tile's numbers."""
        number: Any = 0
        of_runs = (number,) * len(scheduler.runs)
        tile = cls(
            scheduler, number, number, number, number,
            number if "end" in scheduler.operands else None,
            of_runs, of_runs,
            SinkTiles(*(number,) * 5) if scheduler.sink_tile else None,
            number if scheduler.zeroes_padding else None,
        )  # fmt: skip
        return jax.tree.structure(tile)

    @classmethod
    def rows_of_numbers(cls, scheduler: TileScheduler) -> int:
        """Rows of `ROWS` numbers that `store` takes: one, but for many runs."""
        return pl.cdiv(cls.structure(scheduler).num_leaves, ROWS)

    @classmethod
    def load(cls, scheduler: TileScheduler, numbers: Any) -> "WorkTile":
        """The tile whose numbers `store` has left."""
        structure = cls.structure(scheduler)
        found = [numbers[divmod(n, ROWS)] for n in range(structure.num_leaves)]
        return jax.tree.unflatten(structure, found)

    def store(self, numbers: Any) -> None:
        """Leaves the numbers in shared memory, [rows, ROWS]."""
        for n, number in enumerate(jax.tree.leaves(self)):
            numbers[divmod(n, ROWS)] = number

    @property
    def first_head(self) -> Array:
        """Its first query head."""
        return self.head_tile * self.scheduler.tiles.heads

    @property
    def kv_head(self) -> Array:
        """The key/value head of all its heads."""
        return lax.div(self.first_head, jnp.int32(self.scheduler.group))

    @property
    def num_key_tiles(self) -> Array:
        """Tiles of keys in the windows of its queries, in all runs."""
        return sum(self.key_tiles_of_runs[1:], self.key_tiles_of_runs[0])

    def row_group(self, warpgroup: int | Array) -> Array:
        """Number of the positions that a warpgroup has, counted from the shard's first ones."""
        return self.scheduler.row_group(self.query_tile, warpgroup)

    def first_position(self, warpgroup: int | Array) -> Array:
        """Position of a warpgroup's first query, a multiple of 8."""
        return self.scheduler.first_position(self.query_tile, warpgroup)

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

    def is_unmasked(
        self,
        first_query: int | Array,
        low: Array | None,
        n: int | Array,
        first_end: Array | None = None,
    ) -> Array:
        """Every query from ``first_query`` on sees every key of the ``n``-th tile of keys.

        All these queries see the keys from ``low`` on, None: any. The first one's sequence ends at
        ``first_end``, None: no key is behind that.
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
        assert self.sinks is not None
        scheduler, sinks = self.scheduler, self.sinks
        fetched = n >= sinks.num_own
        begin = stop = jnp.int32(0)
        if scheduler.num_sinks:
            begin = sinks.own_begin_in_eights * 8 + n * scheduler.sink_tile
            begin, stop = (plus(x, scheduler.spec.first_key) for x in (begin, sinks.own_end))
        if scheduler.num_fetched_sinks:
            fetched_begin = sinks.crossing + (n - sinks.num_own) * scheduler.sink_tile
            begin = jnp.where(fetched, fetched_begin, begin)
            stop = jnp.where(fetched, sinks.crossing + scheduler.num_fetched_sinks, stop)
        return begin, stop, fetched
