"""Which tiles of queries each program of the forward kernel takes.

`work_tile` says what such a tile is, and `tile_finder` which keys it sees.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._kernels import ForwardInputs
from pallas_kernels._masks import sees_all_keys
from pallas_kernels._mosaic_gpu.forward.padding import padding_operands, zeroes_in_kernel
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._mosaic_gpu.tiles import MOSAIC_SINKS, MosaicTiles
from pallas_kernels._spec import Spec
from pallas_kernels._tile_ranges import key_span

LONG_WINDOW = 2048
"""Window from which on packed documents have their longest tiles first. On an H100 that took up to
4% off launches at 4095 and without a window, and added 3% at 1000, where tiles hardly differ."""


class TileScheduler:
    """A launch over the queries ``rows``, whose tiles so many ``programs`` share.

    A warpgroup has `ROWS` rows of a tile: ``positions_per_warpgroup`` positions of each of
    ``tiles.heads`` heads of a group, one head after the other.

    Attributes:
        runs: (position of the first key, number of keys) of each run.
        query_tiles: tiles of queries, by positions.
        head_tiles: tiles of heads.
        group: query heads of a head of keys.
        num_tiles: tiles of queries of all heads and rows of the batch, which programs take.
        grid: how many programs there are.
        packed: whether each query has a start of its own.
        has_ends_by_row: whether each query has an end of its own.
        has_halo: whether some keys are not at the positions of the shard's queries.
        sees_all: whether every query sees every key.
        own: which run has the shard's own keys.
        num_sinks: sinks to look for in that run.
        num_fetched_sinks: how many there are.
        sink_tile: rows of a tile of sinks; 0 where none is taken apart from the windows' keys.
        longest_first: whether tiles are taken in the order ``operands["order"]``.
        sorted_by_work: whether tiles come in the order of how many keys they see. Then the order of
            the programs turns round with each tile that they take. Else one end of the programs
            would have the most work of each round: 6% more than the mean in all, for one document
            of 16384 tokens and 16 heads without a window.
        operands: the arrays that the scheduler reads, keys and values among them.
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
        self.sees_all = len(runs) == 1 and sees_all_keys(
            spec.window,
            first_query=rows[0],
            keys_end=runs[0].offset + runs[0].key.shape[1],
            one_sequence=not self.packed and end is None,
        )
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
        self.sorted_by_work = self.longest_first or (batch == 1 and not self.packed)
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

    def row_group(self, query_tile: Array, warpgroup: int | Array) -> Array:
        """Number of the positions that a warpgroup has, counted from the shard's first ones."""
        first = self.rows[0] // self.positions_per_warpgroup
        return first + query_tile * self.tiles.warpgroups + warpgroup

    def first_position(self, query_tile: Array, warpgroup: int | Array) -> Array:
        """Position of a warpgroup's first query, a multiple of 8."""
        group = self.row_group(query_tile, warpgroup)
        return group * (self.positions_per_warpgroup // 8) * 8

    def num_work_tiles(self) -> Array:
        """How many tiles this program takes."""
        rounds, rest = divmod(self.num_tiles, self.grid)
        return rounds + (self._place_in_round(jnp.int32(rounds)) < rest).astype(jnp.int32)

    def work_tile(self, number: Array) -> Array:
        """The ``number``-th tile that this program takes."""
        return number * self.grid + self._place_in_round(number)

    def _place_in_round(self, number: Array) -> Array:
        """Which of the tiles that the programs take at a time is this program's."""
        program = lax.axis_index("program")
        if not self.sorted_by_work:
            return program
        return jnp.where(lax.rem(number, jnp.int32(2)) == 1, self.grid - 1 - program, program)
