"""The loop of a tile of queries over its keys, which the forward and the dquery kernel share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._kernels import BackwardInputs, ForwardInputs
from pallas_kernels._masks import sees, sees_fetched_sink, sees_sink_before
from pallas_kernels._sink_ranges import fetched_sink_key_plan
from pallas_kernels._spec import Ends, KeyRun, Spec
from pallas_kernels._tile_ranges import KeyColumns, key_plan, with_padding
from pallas_kernels._triton.blocks import (
    Rows,
    batch_block,
    bounds_blocks,
    bounds_operands,
    column,
    div,
    load_bounds,
    load_rows,
    load_vector,
    real_keys,
    rem,
)
from pallas_kernels._triton.tiles import TritonTiles, sink_tile


class QueryTile(NamedTuple):
    """The queries of a program, one a row and head.

    ``rows`` indexes arrays of [rows(, heads), dim], ``flat`` those of [(heads, )rows].
    ``valid`` is None where no tile is ragged.
    """

    number: Array
    rows: Rows
    flat: Rows
    positions: Array
    valid: Array | None
    start: Array
    end: Array | None


class KeyLoop:
    """A launch of one program a tile of queries, on the grid (tiles, N / heads of a tile, B).

    A tile holds ``tiles.query`` positions of one or several heads of a group, which read the same
    keys: in a short window fewer of these are then masked.
    ``arrays`` and ``blocks`` hold what the loop reads: plans, starts, keys and fetched sinks.
    """

    def __init__(
        self,
        spec: Spec,
        inputs: ForwardInputs | BackwardInputs,
        rows: tuple[int, int],
        tiles: TritonTiles,
    ):
        query, runs, sinks, start = inputs.query, inputs.runs, inputs.sinks, inputs.start
        self.spec, self.rows, self.tiles = spec, rows, tiles
        self.offsets = tuple(run.offset for run in runs)
        group = query.shape[2] // runs[0].key.shape[2]
        self.heads = tiles.heads
        self.size = tiles.query * self.heads
        self.num_tiles = pl.cdiv(rows[1] - rows[0], tiles.query)
        self.grid = (self.num_tiles, query.shape[2] // self.heads, query.shape[0])
        self.packed = start.ndim > 0
        plans = [self._plan(start, inputs.end, run) for run in runs]
        self.arrays: dict[str, Any] = {
            **bounds_operands(start, inputs.end),
            "plans": [plan if self.packed else plan[None] for plan in plans],
            "keys": [(run.key, run.value) for run in runs],
        }
        self.blocks: dict[str, Any] = {
            **bounds_blocks(self.arrays),
            "plans": [batch_block(plan) for plan in self.arrays["plans"]],
            "keys": [tuple(self._key_block(x, group) for x in kv) for kv in self.arrays["keys"]],
        }
        if sinks is not None:
            assert spec.window is not None
            plan = fetched_sink_key_plan(
                start,
                spec.window,
                rows=rows,
                query_tile=tiles.query,
                length=sinks.key.shape[1],
                key_tile=self._sink_tile(),
                first_key=spec.first_key,
            )
            self.arrays["sink_plan"] = plan if self.packed else plan[None]
            # Fetched sinks hold values of the keys' dtype, so this cast loses nothing.
            self.arrays["sinks"] = tuple(x.astype(query.dtype) for x in sinks)
            self.blocks["sink_plan"] = batch_block(self.arrays["sink_plan"])
            self.blocks["sinks"] = tuple(self._key_block(x, group) for x in sinks)

    def _plan(self, start: Array, end: Ends, run: KeyRun) -> Array:
        """`key_plan`, and whether the keys include padding where they may: in the shard's own."""
        plan = key_plan(
            start,
            self.spec.window,
            self.spec.sinks_in(run.offset),
            rows=self.rows,
            query_tile=self.tiles.query,
            offset=run.offset,
            length=run.key.shape[1],
            key_tile=self.tiles.key,
            end=end,
        )
        if not self.packed or run.offset != self.spec.first_key:
            return plan
        begin, stop = plan[..., KeyColumns.BEGIN], plan[..., KeyColumns.END]
        return with_padding(plan, start, begin, stop, self.tiles.key, end)

    def head_block(self, x: Any) -> pl.BlockSpec:
        """All rows of the heads of a tile, of [B, rows, N, dim]."""
        heads = None if self.heads == 1 else self.heads
        block = (None, x.shape[1], heads, x.shape[3])
        return pl.BlockSpec(block, lambda t, n, b: (b, 0, n, 0))

    def lse_block(self, x: Any) -> pl.BlockSpec:
        """All rows of the heads of a tile, of [B, N, rows]."""
        heads = None if self.heads == 1 else self.heads
        return pl.BlockSpec((None, heads, x.shape[2]), lambda t, n, b: (b, n, 0))

    def _sink_tile(self) -> int:
        """Sinks of a step: no more than its keys, so that they take no more shared memory."""
        return min(sink_tile(self.spec.num_sinks), self.tiles.key)

    def _key_block(self, x: Any, group: int) -> pl.BlockSpec:
        sharing = group // self.heads
        block = (None, x.shape[1], None, x.shape[3])
        return pl.BlockSpec(block, lambda t, n, b: (b, 0, div(n, sharing), 0))

    def query_tile(self, refs) -> QueryTile:
        """This program's queries; the last ones, which see most under a causal mask, go first."""
        index = self.num_tiles - 1 - pl.program_id(0)
        begin = self.rows[0] + index * self.tiles.query
        row = jnp.arange(self.size, dtype=jnp.int32)
        positions = begin + div(row, self.heads)
        rows: Rows
        flat: Rows
        if self.heads == 1:
            rows = flat = (pl.ds(begin, self.size),)
        else:
            head = rem(row, self.heads)
            rows, flat = (positions, head), (head, positions)
        ragged = (self.rows[1] - self.rows[0]) % self.tiles.query
        valid = positions < self.rows[1] if ragged else None
        start, end = load_bounds(refs, positions, valid, packed=self.packed)
        return QueryTile(index, rows, flat, positions, valid, start, end)

    def head_values(self, ref) -> Array:
        """One value a row of the tile, from [N]; a scalar for a tile of one head."""
        first = pl.program_id(1) * self.heads
        if self.heads == 1:
            return ref[first]
        row = jnp.arange(self.size, dtype=jnp.int32)
        return load_vector(ref, (first + rem(row, self.heads),))

    def run(self, refs, tile: QueryTile, body: Callable, carry):
        """Runs ``carry = body(carry, keys, values, seen)`` for each tile of keys that is seen.

        ``seen`` is None where every query of the tile sees every key.
        """
        for plan, offset, key_value in zip(refs["plans"], self.offsets, refs["keys"], strict=True):
            carry = self._run_keys(refs, plan, offset, key_value, tile, body, carry)
        if "sinks" in refs:
            carry = self._run_fetched_sinks(refs, tile, body, carry)
        return carry

    def _run_keys(self, refs, plan_ref, offset, key_value, tile: QueryTile, body, carry):
        size, length = self.tiles.key, key_value[0].shape[0]
        num_sinks = self.spec.sinks_in(offset)
        is_own = offset == self.spec.first_key

        def real(local, exists):
            return real_keys(refs, self.spec, offset, local, exists)

        def step(t, carry, masked=True, padded=self.packed and not is_own):
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
            seen = sees(i, j, start, self.spec.window, num_sinks, packed=self.packed, end=end)
            return body(carry, keys, values, seen if exists is None else seen & exists[None, :])

        begin, unmasked_begin, unmasked_end, end = (
            plan_ref[tile.number, n] for n in KeyColumns.WINDOW
        )
        if num_sinks:
            carry = self._run_own_sinks(refs, begin * size, key_value, tile, body, carry)
        if self.packed and is_own:
            # Keys whose loads wait for their starts arrive late: only where there is padding.
            stop = jnp.where(plan_ref[tile.number, KeyColumns.HAS_PADDING] > 0, end, begin)
            carry = lax.fori_loop(begin, stop, lambda t, c: step(t, c, padded=True), carry)
            begin, unmasked_begin, unmasked_end = (
                jnp.maximum(x, stop) for x in (begin, unmasked_begin, unmasked_end)
            )
        if self.tiles.unmasked_loop:
            carry = lax.fori_loop(begin, unmasked_begin, step, carry)
            unmasked = partial(step, masked=False)
            carry = lax.fori_loop(unmasked_begin, unmasked_end, unmasked, carry)
            return lax.fori_loop(unmasked_end, end, step, carry)
        return lax.fori_loop(begin, end, step, carry)

    def _run_own_sinks(self, refs, end, key_value, tile: QueryTile, body, carry):
        """The sinks before own key ``end``: of the first query's sequence, as the plan says."""
        size, first_key = self._sink_tile(), self.spec.first_key
        row = self.rows[0] + tile.number * self.tiles.query if self.packed else 0
        first_start = self._own_key(refs["start"][row])
        first = jnp.maximum(first_start, 0)
        stop = jnp.minimum(first_start + self.spec.num_sinks, end)
        stop = jnp.minimum(stop, key_value[0].shape[0])

        def step(t, carry):
            local = first + t * size + jnp.arange(size, dtype=jnp.int32)
            keys, values = (
                load_rows(ref, (pl.ds(first + t * size, size),), local < stop) for ref in key_value
            )
            i, start = column(tile.positions), column(tile.start)
            j, stop_position = (x + first_key if first_key else x for x in (local, stop))
            seen = sees_sink_before(i, j[None, :], start, self.spec.num_sinks, stop_position)
            return body(carry, keys, values, seen)

        count = div(jnp.maximum(stop - first, 0) + size - 1, size)
        return lax.fori_loop(0, count, step, carry)

    def _own_key(self, position):
        """The index of the shard's own key at a position."""
        return position + self.spec.lookahead if self.spec.lookahead else position

    def _run_fetched_sinks(self, refs, tile: QueryTile, body, carry):
        size, length = self._sink_tile(), refs["sinks"][0].shape[0]
        crossing = refs["start"][0]

        def fetched(slots, exists):
            del exists
            return crossing + slots < self.spec.first_key

        def step(t, carry):
            keys, values, slots, exists = _load_tile(
                refs["sinks"], t * size, size, length, fetched if self.packed else None
            )
            i, start = column(tile.positions), column(tile.start)
            j = crossing + slots[None, :]
            seen = sees_fetched_sink(
                i, j, start, self.spec.window, self.spec.num_sinks, first_key=self.spec.first_key
            )
            return body(carry, keys, values, seen if exists is None else seen & exists[None, :])

        return lax.fori_loop(0, refs["sink_plan"][tile.number], step, carry)


def _load_tile(key_value, begin, size: int, length: int, real: Callable | None):
    """Keys and values of a tile, their indices, and which exist (None: all).

    ``real(indices, exists)`` says which do not count as zeros; None stands for all.
    """
    local = begin + jnp.arange(size, dtype=jnp.int32)
    exists = local < length if length % size else None
    if real is not None:
        exists = real(local, exists) if exists is None else exists & real(local, exists)
    keys, values = (load_rows(ref, (pl.ds(begin, size),), exists) for ref in key_value)
    return keys, values, local, exists
