"""Tiles of queries and of keys, and the loop of a tile of queries over the keys that it sees."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from pallas_kernels._masks import sees, sees_behind_halo, sees_fetched_sink
from pallas_kernels._slices import slice_in_dim, update_in_dim
from pallas_kernels._spec import KeyRun, SinkRun, Spec
from pallas_kernels._tile_ranges import key_plan
from pallas_kernels._tiles import Tiles
from pallas_kernels._xla.arrays import Bounds


def xla_tiles(window: int | None) -> Tiles:
    """About as long as the window, so that the two edges of a range are not most of it."""
    num_keys = 256 if window is None else window + 1
    size = min(256, max(64, 1 << (num_keys - 1).bit_length()))
    return Tiles(size, size)


def key_plans(
    spec: Spec, runs: tuple[KeyRun, ...], bounds: Bounds, rows: tuple[int, int]
) -> tuple[Int[Array, "..."], ...]:
    """The `key_plan` of each run."""
    return tuple(
        key_plan(
            bounds.start,
            spec.window,
            _sinks_in(spec, run.offset, run.key.shape[1]),
            rows=rows,
            query_tile=min(xla_tiles(spec.window).query, rows[1] - rows[0]),
            offset=run.offset,
            length=run.key.shape[1],
            key_tile=min(xla_tiles(spec.window).key, run.key.shape[1]),
            end=bounds.end,
        )
        for run in runs
    )


def _sinks_in(spec: Spec, offset: int, length: int) -> int:
    """Sinks to look for in a run: only the shard's own keys hold any."""
    return spec.num_sinks if offset <= spec.first_key < offset + length else 0


class QueryTile(NamedTuple):
    """A slice of the queries.

    Attributes:
        number: of the tile.
        begin: of the slice.
        positions: of its queries.
        bounds: of their sequences.
        own: which of them are not the tile's before.
    """

    number: Int[Array, ""] | int
    begin: Int[Array, ""]
    positions: Int[Array, "Q"]
    bounds: Bounds
    own: Bool[Array, "Q"]

    def rows_of(self, x: Float[Array, "..."], axis: int = 0) -> Float[Array, "..."]:
        """The tile's rows of an array of all queries."""
        return slice_in_dim(x, self.begin, self.positions.size, axis)

    def put(
        self,
        x: Float[Array, "*whole"],
        new: Float[Array, "*tile"],
        before: Float[Array, "*tile"],
        axis: int = 0,
    ) -> Float[Array, "*whole"]:
        """The array of all queries with new rows of this tile, where they are its own."""
        own = self.own.reshape(-1, *[1] * (x.ndim - axis - 1))
        return update_in_dim(x, jnp.where(own, new, before), self.begin, axis)


class KeyTile(NamedTuple):
    """A slice of keys and values, which query sees which, and where it begins in its run."""

    key: Float[Array, "S K H"]
    value: Float[Array, "S K Hv"]
    seen: Bool[Array, "Q S"]
    begin: Int[Array, ""] | int


class KeyLoop(NamedTuple):
    """The loops of one row of the batch.

    Attributes:
        spec: static settings.
        rows: half-open range of queries.
        bounds: of the queries' sequences.
        offsets: position of the first key of each run.
        plans: the `key_plans`.
    """

    spec: Spec
    rows: tuple[int, int]
    bounds: Bounds
    offsets: tuple[int, ...]
    plans: tuple[Int[Array, "tiles 6"], ...]

    @property
    def num_query_tiles(self) -> int:
        """Tiles of queries of the row."""
        return -(-(self.rows[1] - self.rows[0]) // xla_tiles(self.spec.window).query)

    def query_tile(self, number: Int[Array, ""] | int) -> QueryTile:
        """A tile of queries; the last one is moved back to end with the rows."""
        size = min(xla_tiles(self.spec.window).query, self.rows[1] - self.rows[0])
        first = self.rows[0] + number * size
        begin = jnp.minimum(first, self.rows[1] - size)
        positions = begin + jnp.arange(size, dtype=jnp.int32)
        bounds = self.bounds
        if bounds.packed:
            start, end = bounds
            start = slice_in_dim(start, begin, size)
            end = None if end is None else slice_in_dim(end, begin, size)
            bounds = Bounds(start, end)
        return QueryTile(number, begin, positions, bounds, positions >= first)

    def over_run(
        self, n: int, key_value: tuple[Array, Array], tile: QueryTile, visit: Callable, carry
    ):
        """Folds ``carry = visit(key tile, carry)`` over what the query tile sees of run ``n``."""
        spec, offset, length = self.spec, self.offsets[n], key_value[0].shape[0]
        plan = self.plans[n][tile.number]
        size = min(xla_tiles(spec.window).key, length)
        sink_begin, sink_end, begin, _, _, stop = plan
        skipped = begin - sink_end
        rule = sees
        if offset != spec.first_key:
            rule = partial(sees_behind_halo, first_key=spec.first_key)
        start, end = (None if x is None else x[..., None] for x in tile.bounds)
        # A tile of joined runs may hold keys before the first sequence, which are nobody's.
        joined = offset < spec.first_key < offset + length

        def body(index, carry):
            first_key = jnp.where(index < sink_end, index, index + skipped) * size
            slice_begin = jnp.minimum(first_key, length - size)
            local = slice_begin + jnp.arange(size, dtype=jnp.int32)
            seen = rule(
                tile.positions[:, None],
                offset + local,
                start,
                spec.window,
                _sinks_in(spec, offset, length),
                packed=tile.bounds.packed or joined,
                end=end,
            )
            key, value = (slice_in_dim(x, slice_begin, size) for x in key_value)
            seen = seen & tile.own[:, None] & (local >= first_key)
            return visit(KeyTile(key, value, seen, slice_begin), carry)

        return lax.fori_loop(sink_begin, stop - skipped, body, carry)

    def fetched_sinks(self, sinks: SinkRun, tile: QueryTile) -> KeyTile:
        """All fetched sinks, which are one tile."""
        packed, start = self.bounds.packed, self.bounds.start
        crossing = start[0] if packed else start
        positions = crossing + jnp.arange(sinks.key.shape[0], dtype=jnp.int32)
        spec = self.spec
        seen = sees_fetched_sink(
            tile.positions[:, None],
            positions,
            tile.bounds.start[..., None],
            spec.window,
            spec.num_sinks,
            first_key=spec.first_key,
        )
        if packed:
            real = (positions < spec.first_key)[:, None, None]
            sinks = SinkRun(*(jnp.where(real, x, 0) for x in sinks))
        return KeyTile(sinks.key, sinks.value, seen & tile.own[:, None], 0)
