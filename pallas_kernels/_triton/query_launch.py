"""A launch of one program a tile of queries, as the forward and the dquery kernel are launched."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels._kernels import BackwardInputs, ForwardInputs
from pallas_kernels._sink_ranges import fetched_sink_key_plan
from pallas_kernels._spec import Ends, KeyRun, Spec
from pallas_kernels._tile_ranges import KeyColumns, key_plan, with_padding
from pallas_kernels._triton.blocks import (
    Rows,
    batch_block,
    bounds_blocks,
    bounds_operands,
    div,
    load_bounds,
    load_vector,
    rem,
)
from pallas_kernels._triton.tiles import TritonTiles, sink_tile


class QueryRows(NamedTuple):
    """The queries of a program, one for each position and head of its tile.

    Attributes:
        number: of the tile.
        rows: indexes arrays of [rows, dim]; of [rows, heads, dim] if a tile has several heads.
        flat: indexes arrays of [rows] or [heads, rows], likewise.
        positions: of the queries.
        valid: which queries exist; None where no tile is ragged.
        start: of their sequences; a number unless sequences are packed.
        end: of these sequences, likewise; None where no key is behind them.
    """

    number: Array
    rows: Rows
    flat: Rows
    positions: Array
    valid: Array | None
    start: Array
    end: Array | None


class QueryLaunch:
    """A launch of one program a tile of queries, on the grid (tiles, N / heads of a tile, B).

    A tile holds ``tiles.query`` positions of one or several heads of a group, which read the same
    keys: in a short window fewer of these are then masked.

    Attributes:
        spec: static settings.
        rows: half-open range of the queries.
        tiles: tile sizes.
        offsets: positions of the runs' first keys.
        heads: of a tile.
        size: rows of a tile, one for each position and head.
        grid: of the launch.
        packed: whether each query has a start of its own.
        arrays: what `key_loop` reads: plans, starts, ends, keys and fetched sinks.
        blocks: of the arrays.
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
                key_tile=self.sink_tile,
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

    @property
    def sink_tile(self) -> int:
        """Sinks of a step: no more than its keys, so that they take no more shared memory."""
        return min(sink_tile(self.spec.num_sinks), self.tiles.key)

    def _key_block(self, x: Any, group: int) -> pl.BlockSpec:
        sharing = group // self.heads
        block = (None, x.shape[1], None, x.shape[3])
        return pl.BlockSpec(block, lambda t, n, b: (b, 0, div(n, sharing), 0))

    def query_rows(self, refs: dict[str, Any]) -> QueryRows:
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
        return QueryRows(index, rows, flat, positions, valid, start, end)

    def head_values(self, ref: Any) -> Array:
        """One value a row of the tile, from [N]; a scalar for a tile of one head."""
        first = pl.program_id(1) * self.heads
        if self.heads == 1:
            return ref[first]
        row = jnp.arange(self.size, dtype=jnp.int32)
        return load_vector(ref, (first + rem(row, self.heads),))
