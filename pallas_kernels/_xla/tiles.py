"""Tiles of queries and of keys, and which tiles of keys a tile of queries visits."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from pallas_kernels._masks import sees, sees_fetched_sink, sees_without_fetched_sinks
from pallas_kernels._spec import KeyRun, SinkRun, Spec
from pallas_kernels._tile_positions import tiles_of
from pallas_kernels._tile_ranges import key_plan, key_span
from pallas_kernels._tiles import Tiles
from pallas_kernels._xla.arrays import Bounds, put_rows, take_rows

MAX_WINDOW = 255
"""The longest window whose keys are one slice for each tile of queries.

So the program has one loop, not two, which is half to compile. On a CPU of two cores, slices were
faster than a loop over tiles of keys at a window of 300, and up to 25% slower at 511 and 1023.
"""


def xla_tiles(window: int | None) -> Tiles:
    """About as long as the window, so that the two edges of a range are not most of it."""
    num_keys = 256 if window is None else window + 1
    size = min(256, max(64, 1 << (num_keys - 1).bit_length()))
    return Tiles(size, size)


class QueryTile(NamedTuple):
    """A slice of the queries.

    Attributes:
        number: of the tile.
        begin: of the slice.
        positions: of its queries.
        bounds: of their sequences.
        own: which of them are not the tile's before; None: all.
    """

    number: Int[Array, ""] | int
    begin: Int[Array, ""] | int
    positions: Int[Array, "Q"]
    bounds: Bounds
    own: Bool[Array, "Q"] | None

    def rows_of(self, x: Float[Array, "..."], axis: int = 1) -> Float[Array, "..."]:
        """The tile's rows of an array of all queries."""
        return take_rows(x, self.begin, self.positions.size, axis)

    def put(
        self, x: Float[Array, "*whole"], new: Float[Array, "*tile"], axis: int = 1
    ) -> Float[Array, "*whole"]:
        """The array of all queries with new rows of this tile, where they are its own."""
        if self.own is not None:
            own = self.own.reshape(-1, *[1] * (x.ndim - axis - 1))
            new = jnp.where(own, new, self.rows_of(x, axis))
        return put_rows(x, new, self.begin, axis)


class KeyTile(NamedTuple):
    """A slice of keys and values, which query sees which, and where it begins in its run."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    seen: Bool[Array, "#B 1 1 Q S"]
    begin: Int[Array, ""] | int


class TileLoop(NamedTuple):
    """The tiles of one launch.

    Attributes:
        spec: static settings.
        rows: half-open range of queries.
        bounds: of the queries' sequences; those of several rows only with one slice of keys.
        run: all keys but fetched sinks.
        plan: the `key_plan` where there are sinks, else None.
    """

    spec: Spec
    rows: tuple[int, int]
    bounds: Bounds
    run: KeyRun
    plan: Int[Array, "tiles 6"] | None

    @classmethod
    def of(cls, spec: Spec, rows: tuple[int, int], bounds: Bounds, run: KeyRun) -> "TileLoop":
        """With its plan, where one is wanted."""
        loop = cls(spec, rows, bounds, run, None)
        return loop._replace(plan=loop._key_plan()) if loop.num_sinks else loop

    @property
    def query_rows(self) -> int:
        """Rows of a tile of queries."""
        return min(xla_tiles(self.spec.window).query, self.rows[1] - self.rows[0])

    @property
    def key_rows(self) -> int:
        """Rows of a tile of keys, where there are several."""
        return min(xla_tiles(self.spec.window).key, self.run.key.shape[1])

    @property
    def num_sinks(self) -> int:
        """Sinks to look for in the run: only the shard's own keys hold any."""
        begin, length = self.run.offset, self.run.key.shape[1]
        return self.spec.num_sinks if begin <= self.spec.first_key < begin + length else 0

    def over_queries(self, visit: Callable, carry: Any) -> Any:
        """Folds ``carry = visit(tile, carry)`` over all tiles of queries."""
        count = -(-(self.rows[1] - self.rows[0]) // self.query_rows)

        def body(number, carry):
            return visit(self._query_tile(number), carry)

        return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)

    def _query_tile(self, number: Int[Array, ""] | int) -> QueryTile:
        """A tile of queries; the last one is moved back to end with the rows."""
        size, (first_row, end_row) = self.query_rows, self.rows
        first = begin = first_row + number * size
        divided = (end_row - first_row) % size == 0
        if not divided:
            begin = jnp.minimum(first, end_row - size)
        positions = begin + jnp.arange(size, dtype=jnp.int32)
        bounds = self.bounds
        if bounds.packed:
            rows = partial(take_rows, begin=begin, size=size, axis=1)
            bounds = Bounds(rows(bounds.start), None if bounds.end is None else rows(bounds.end))
        return QueryTile(number, begin, positions, bounds, None if divided else positions >= first)

    def over_keys(self, tile: QueryTile, visit: Callable, carry: Any) -> Any:
        """Folds ``carry = visit(key tile, carry)`` over what a tile of queries sees of the run."""
        if one_slice(self.spec):
            return visit(self._window_of(tile), carry)
        length, size = self.run.key.shape[1], self.key_rows
        first, stop, after_sinks, skipped = self._key_tiles(tile)

        def body(index, carry):
            if self.plan is not None:
                index = jnp.where(index < after_sinks, index, index + skipped)
            first_key = slice_begin = index * size
            if length % size:
                slice_begin = jnp.minimum(first_key, length - size)
            keys = self._key_tile(tile, slice_begin, size)
            if length % size:
                is_new = slice_begin + jnp.arange(size, dtype=jnp.int32) >= first_key
                keys = keys._replace(seen=keys.seen & is_new)
            return visit(keys, carry)

        return lax.fori_loop(first, stop, body, carry)

    def _key_tiles(self, tile: QueryTile) -> tuple[Array, Array, Array | int, Array | int]:
        """The tiles of keys that a tile of queries visits, by running numbers.

        Returns:
            The first number and the one behind the last; from which number on tiles are further
            on, because those between sinks and windows are left out, and by how many.
        """
        if self.plan is not None:
            sink_begin, sink_end, begin, _, _, stop = self.plan[tile.number]
            skipped = begin - sink_end
            return sink_begin, stop - skipped, sink_end, skipped
        start, end = tile.bounds
        low, high = key_span(
            tile.positions[0],
            tile.positions[-1],
            start[0, 0] if start.ndim else start,
            self.spec.window,
            offset=self.run.offset,
            length=self.run.key.shape[1],
            last_end=end[0, -1] if end is not None and end.ndim else end,
        )
        return *tiles_of(low, high, self.key_rows), 0, 0

    def _key_plan(self) -> Int[Array, "tiles 6"]:
        plan = key_plan(
            self.bounds.start,
            self.spec.window,
            self.num_sinks,
            rows=self.rows,
            query_tile=self.query_rows,
            offset=self.run.offset,
            length=self.run.key.shape[1],
            key_tile=self.key_rows,
            end=self.bounds.end,
        )
        return plan[0] if self.bounds.packed else plan

    def _window_of(self, tile: QueryTile) -> KeyTile:
        """All keys of the windows of a tile of queries, as one slice."""
        assert self.spec.window is not None
        length = self.run.key.shape[1]
        size = min(self.query_rows + self.spec.window, length)
        begin = jnp.clip(tile.begin - self.spec.window - self.run.offset, 0, length - size)
        return self._key_tile(tile, begin, size)

    def _key_tile(self, tile: QueryTile, begin: Int[Array, ""] | int, size: int) -> KeyTile:
        run, spec = self.run, self.spec
        rule = sees
        if run.offset != spec.first_key:
            rule = partial(sees_without_fetched_sinks, first_key=spec.first_key)
        start, end = (None if x is None else x[..., None] for x in tile.bounds)
        # A tile of joined runs may hold keys before the first sequence, which are nobody's, and
        # so may a slice that no plan has chosen.
        joined = run.offset < spec.first_key < run.offset + run.key.shape[1]
        seen = rule(
            tile.positions[:, None],
            run.offset + begin + jnp.arange(size, dtype=jnp.int32),
            start,
            spec.window,
            self.num_sinks,
            packed=tile.bounds.packed or joined or one_slice(spec),
            end=end,
        )
        key, value = (take_rows(x, begin, size, 1) for x in (run.key, run.value))
        return KeyTile(key, value, _of_heads(seen, tile), begin)

    def fetched_sinks(self, sinks: SinkRun, tile: QueryTile) -> KeyTile:
        """All fetched sinks, which are one tile."""
        packed, start = self.bounds.packed, self.bounds.start
        crossing = start[:, :1] if packed else start
        positions = crossing + jnp.arange(sinks.key.shape[1], dtype=jnp.int32)
        spec = self.spec
        seen = sees_fetched_sink(
            tile.positions[:, None],
            positions[..., None, :],
            tile.bounds.start[..., None],
            spec.window,
            spec.num_sinks,
            first_key=spec.first_key,
        )
        if packed:
            real = (positions < spec.first_key)[..., None, None]
            sinks = SinkRun(*(jnp.where(real, x, 0) for x in sinks))
        return KeyTile(sinks.key, sinks.value, _of_heads(seen, tile), 0)


def one_slice(spec: Spec) -> bool:
    """Whether the keys of a tile of queries are one slice."""
    return spec.window is not None and spec.window <= MAX_WINDOW and not spec.num_sinks


def by_rows(spec: Spec, compute: Callable, bounds: Bounds, *arrays: Any) -> Any:
    """``compute(bounds, *arrays)`` of a batch, whose axis is the first one of all arrays.

    Rows with plans of their own take turns, as their loops differ in length.
    """

    def one_row(row):
        found = compute(*jax.tree.map(lambda x: x[None], row))
        return jax.tree.map(lambda x: x[0], found)

    if not bounds.packed or one_slice(spec) or bounds.start.shape[0] == 1:
        return compute(bounds, *arrays)
    return lax.map(one_row, (bounds, *arrays))


def _of_heads(seen: Shaped[Array, "..."], tile: QueryTile) -> Bool[Array, "#B 1 1 Q S"]:
    """A mask of queries and keys that all heads share, without rows that other tiles have."""
    if tile.own is not None:
        seen = seen & tile.own[:, None]
    return seen.reshape(-1, 1, 1, *seen.shape[-2:])
