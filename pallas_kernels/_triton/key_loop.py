"""The loop of a tile of queries over its keys, which the forward and the dquery kernel share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._masks import sees, sees_fetched_sink, sees_sink_before
from pallas_kernels._spec import Spec, plus
from pallas_kernels._tile_ranges import KeyColumns
from pallas_kernels._triton.blocks import column, div, load_rows, real_keys
from pallas_kernels._triton.query_launch import QueryLaunch, QueryRows

KeyValueRefs = tuple[Any, Any]
"""References to all keys, and to all values, of a run and a head."""


def over_keys(
    launch: QueryLaunch, refs: dict[str, Any], tile: QueryRows, body: Callable, carry: Any
) -> Any:
    """Runs ``carry = body(carry, keys, values, seen)`` for each tile of keys that is seen.

    ``seen`` is None where every query of the tile sees every key.
    """
    return _KeyLoop(launch, refs, tile, body).run(carry)


class _KeyLoop(NamedTuple):
    """The loop of one program; attributes as the arguments of `over_keys`."""

    launch: QueryLaunch
    refs: dict[str, Any]
    tile: QueryRows
    body: Callable

    @property
    def spec(self) -> Spec:
        """Static settings."""
        return self.launch.spec

    def run(self, carry: Any) -> Any:
        """Runs all tiles of keys."""
        refs = self.refs
        for plan, offset, key_value in zip(
            refs["plans"], self.launch.offsets, refs["keys"], strict=True
        ):
            carry = self._run_keys(plan, offset, key_value, carry)
        if "sinks" in refs:
            carry = self._run_fetched_sinks(carry)
        return carry

    def _run_keys(self, plan_ref: Any, offset: int, key_value: KeyValueRefs, carry: Any) -> Any:
        """The tiles of a run's keys: sinks before the windows, then the windows."""
        refs, tile, body = self.refs, self.tile, self.body
        packed, tiles = self.launch.packed, self.launch.tiles
        size, length = tiles.key, key_value[0].shape[0]
        num_sinks = self.spec.sinks_in(offset)
        is_own = offset == self.spec.first_key

        def real(local, exists):
            return real_keys(refs, self.spec, offset, local, exists)

        def step(t, carry, masked=True, padded=packed and not is_own):
            begin = t * size
            if not masked:
                rows = (pl.ds(begin, size),)
                return body(carry, *(load_rows(ref, rows) for ref in key_value), None)
            keys, values, local, exists = _load_tile(
                key_value, begin, size, length, real if padded else None
            )
            i, start = column(tile.positions), column(tile.start)
            end = None if tile.end is None else column(tile.end)
            j = offset + local[None, :]
            seen = sees(i, j, start, self.spec.window, num_sinks, packed=packed, end=end)
            return body(carry, keys, values, seen if exists is None else seen & exists[None, :])

        begin, unmasked_begin, unmasked_end, end = (
            plan_ref[tile.number, n] for n in KeyColumns.WINDOW
        )
        if num_sinks:
            carry = self._run_own_sinks(begin * size, key_value, carry)
        if packed and is_own:
            # Loads that leave padding out wait for starts first, so that keys arrive late. So a
            # tile takes such loads only if its keys include padding, then for all of them.
            stop = jnp.where(plan_ref[tile.number, KeyColumns.HAS_PADDING] > 0, end, begin)
            carry = lax.fori_loop(begin, stop, lambda t, c: step(t, c, padded=True), carry)
            begin, unmasked_begin, unmasked_end = (
                jnp.maximum(x, stop) for x in (begin, unmasked_begin, unmasked_end)
            )
        if tiles.unmasked_loop:
            carry = lax.fori_loop(begin, unmasked_begin, step, carry)
            unmasked = partial(step, masked=False)
            carry = lax.fori_loop(unmasked_begin, unmasked_end, unmasked, carry)
            return lax.fori_loop(unmasked_end, end, step, carry)
        return lax.fori_loop(begin, end, step, carry)

    def _run_own_sinks(self, end: Array, key_value: KeyValueRefs, carry: Any) -> Any:
        """The sinks before own key ``end``: of the first query's sequence, as the plan says."""
        launch, tile, body = self.launch, self.tile, self.body
        size, first_key = launch.sink_tile, self.spec.first_key
        row = launch.rows[0] + tile.number * launch.tiles.query if launch.packed else 0
        first_start = plus(self.refs["start"][row], self.spec.lookahead)
        first = jnp.maximum(first_start, 0)
        stop = jnp.minimum(first_start + self.spec.num_sinks, end)
        stop = jnp.minimum(stop, key_value[0].shape[0])

        def step(t, carry):
            local = first + t * size + jnp.arange(size, dtype=jnp.int32)
            keys, values = (
                load_rows(ref, (pl.ds(first + t * size, size),), local < stop) for ref in key_value
            )
            i, start = column(tile.positions), column(tile.start)
            j, stop_position = (plus(x, first_key) for x in (local, stop))
            seen = sees_sink_before(i, j[None, :], start, self.spec.num_sinks, stop_position)
            return body(carry, keys, values, seen)

        count = div(jnp.maximum(stop - first, 0) + size - 1, size)
        return lax.fori_loop(0, count, step, carry)

    def _run_fetched_sinks(self, carry: Any) -> Any:
        """The sinks that other shards hold, of the sequence that crosses into this one."""
        refs, tile, body = self.refs, self.tile, self.body
        size, length = self.launch.sink_tile, refs["sinks"][0].shape[0]
        crossing = refs["start"][0]

        def fetched(slots, exists):
            del exists
            return crossing + slots < self.spec.first_key

        def step(t, carry):
            keys, values, slots, exists = _load_tile(
                refs["sinks"], t * size, size, length, fetched if self.launch.packed else None
            )
            i, start = column(tile.positions), column(tile.start)
            j = crossing + slots[None, :]
            seen = sees_fetched_sink(
                i, j, start, self.spec.window, self.spec.num_sinks, first_key=self.spec.first_key
            )
            return body(carry, keys, values, seen if exists is None else seen & exists[None, :])

        return lax.fori_loop(0, refs["sink_plan"][tile.number], step, carry)


def _load_tile(
    key_value: KeyValueRefs, begin: Array, size: int, length: int, real: Callable | None
) -> tuple[list[Array], list[Array], Array, Array | None]:
    """Keys and values of a tile, their indices, and which exist (None: all).

    ``real(indices, exists)`` says which do not count as zeros; None stands for all.
    """
    local = begin + jnp.arange(size, dtype=jnp.int32)
    exists = local < length if length % size else None
    if real is not None:
        exists = real(local, exists) if exists is None else exists & real(local, exists)
    keys, values = (load_rows(ref, (pl.ds(begin, size),), exists) for ref in key_value)
    return keys, values, local, exists
