"""Masks of the fused Mosaic GPU backward kernels, and zeros in the padding of their tiles.

A consumer computes the weights of `ROWS` keys, one a row, for the queries of a tile, one a column.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float32

from pallas_kernels._masks import sees
from pallas_kernels._mosaic_gpu.backward.scheduler import ProgramSchedule
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE, BackwardSchedule
from pallas_kernels._mosaic_gpu.padding import zero_padding
from pallas_kernels._mosaic_gpu.primitives import (
    MATRIX,
    ROW,
    ROWS,
    Index,
    broadcast_row,
    load_as,
    opaque_to_compiler,
)
from pallas_kernels._spec import Spec, plus


class KeyBounds(NamedTuple):
    """Positions of the first key that any query sees, and behind the last; None: no mask for it."""

    first: Index | None
    stop: Index | int | None


class TileMasks(NamedTuple):
    """What a launch's programs mask, and which padding they set to zero.

    Attributes:
        spec: static settings.
        schedule: of the launch.
        num_queries: queries of the shard.
        has_ends_by_row: whether each query has an end of its own.
    """

    spec: Spec
    schedule: BackwardSchedule
    num_queries: int
    has_ends_by_row: bool

    def key_bounds(self, refs: dict[str, Any]) -> KeyBounds:
        """The positions of the keys that any query sees, where tiles hold others too."""
        schedule, stop = self.schedule, None
        if schedule.num_keys % schedule.key_tile:
            stop = schedule.offset + schedule.num_keys
        if "bounds" not in refs:
            return KeyBounds(None, stop)
        first, end = refs["bounds"][0], refs["bounds"][1]
        return KeyBounds(first, end if stop is None else jnp.minimum(end, stop))

    def query_bounds(self, smem: dict[str, Any], slot: Index) -> tuple[Any, Any]:
        """Refs of where the sequences of a tile's queries start and end; None if there is none."""
        start = smem["start"].at[slot] if self.schedule.packed else None
        return start, smem["end"].at[slot] if self.has_ends_by_row else None

    def apply(
        self,
        query_bounds: tuple[Any, Any],
        first_key: Index,
        key_bounds: KeyBounds,
        query_block: Index,
        weights: Float32[Array, "64 queries"],
    ) -> Float32[Array, "64 queries"]:
        """Weights with zeros where a query does not see a key.

        Args:
            query_bounds: what `query_bounds` returns for the tile of queries.
            first_key: position of the first of the `ROWS` keys.
            key_bounds: what `key_bounds` returns.
            query_block: number of the tile of queries.
            weights: of keys by queries.
        """
        j = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERY_TILE), 0, layout=MATRIX)
        i = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERY_TILE), 1, layout=MATRIX)
        i, j = i * opaque_to_compiler(1) + query_block * QUERY_TILE, j + first_key
        starts, ends = (None if x is None else broadcast_row(load_as(x, ROW)) for x in query_bounds)
        packed = self.schedule.packed
        seen = sees(i, j, starts, self.spec.window, 0, packed=packed, end=ends)
        if key_bounds.first is not None:
            seen &= j >= key_bounds.first
        if key_bounds.stop is not None:
            seen &= j < key_bounds.stop
        return jnp.where(seen, weights, 0.0)

    def zero_padding_of_queries(
        self,
        smem: dict[str, Any],
        slot: Index,
        query_block: Index,
        slots: Mapping[str, Index | int],
    ) -> None:
        """Sets the padding of a tile of queries to zero.

        Args:
            smem: buffers in shared memory.
            slot: that of the tile's starts and of its padding flag.
            query_block: number of the tile.
            slots: the arrays to write, by name, each with the slot of its tile.
        """
        if not self.schedule.packed:
            return

        @pl.when(smem["padding"][slot, 0] != 0)
        def write():
            tiles = [smem[name].at[opaque_to_compiler(n)] for name, n in slots.items()]
            first = query_block * QUERY_TILE
            first = plus(first, self.spec.first_key)
            zero_padding(tiles, smem["start"].at[slot], first)

    def zero_padding_of_keys(
        self,
        refs: dict[str, Any],
        smem: dict[str, Any],
        program: ProgramSchedule,
        first_row: int | Index = 0,
    ) -> None:
        """Sets the padding of the shard's own keys and values to zero.

        Nothing to do for a halo, whose sender has done so; nor where keys are moved, whose padding
        the caller has set to zero before the launch.

        Args:
            refs: arrays in global memory.
            smem: buffers in shared memory.
            program: the schedule of the program that asks.
            first_row: the first of the `ROWS` rows of the program's tile to look at.
        """
        schedule = self.schedule
        only_halo = schedule.halo_key_tiles == schedule.num_key_tiles
        if not schedule.packed or only_halo or self.spec.lookahead:
            return
        position = program.key_block * schedule.key_tile + schedule.offset + first_row
        tiles = pl.cdiv(self.num_queries, ROWS)
        tile = lax.div(jnp.maximum(position, 0), jnp.int32(ROWS))
        has_starts = (position >= 0) & (tile < tiles)
        tile = jnp.minimum(tile, tiles - 1)

        @pl.when(has_starts & (refs["padding"][program.row, tile, 0] != 0))
        def write():
            rows = pl.ds(first_row, ROWS)
            starts = refs["start"].at[program.row, pl.ds(tile * ROWS, ROWS)]
            zero_padding([smem[name].at[rows] for name in ("key", "value")], starts, position)
