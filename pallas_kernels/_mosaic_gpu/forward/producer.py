"""The warpgroup of the forward kernel that fetches queries, keys and values through TMA.

It runs ahead of the warpgroups that compute, as far as there are free stages.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._mosaic_gpu.forward.config import ForwardConfig
from pallas_kernels._mosaic_gpu.forward.tile_finder import TileFinder
from pallas_kernels._mosaic_gpu.forward.work_tile import WorkTile
from pallas_kernels._mosaic_gpu.primitives import fori


class Producer:
    """Fetches what the consumers need, tile of queries by tile of queries."""

    def __init__(
        self, config: ForwardConfig, refs: dict[str, Any], smem: dict[str, Any], barriers: Any
    ):
        self.config, self.refs, self.smem, self.barriers = config, refs, smem, barriers

    def run(self) -> None:
        """All tiles of this program."""
        scheduler = self.config.scheduler
        finder = TileFinder(scheduler, self.refs)

        def step(number, fetched):
            tile = finder.of_program(number)
            self._queries(tile, number)
            keys, sinks = fetched
            if tile.sinks is not None:
                self._sinks(tile, sinks)
                sinks = sinks + tile.sinks.num
            return self._keys(tile, keys), sinks

        fori(0, scheduler.num_work_tiles(), step, (jnp.int32(0), jnp.int32(0)))

    def _queries(self, tile: WorkTile, number: Array) -> None:
        """A tile of queries, its numbers, and where documents start for its rows."""
        tiles, positions = self.config.tiles, self.config.scheduler.positions_per_warpgroup
        stage = lax.rem(number, jnp.int32(tiles.query_slots))

        @pl.when(number >= tiles.query_slots)
        def wait():  # until all consumers have read the tile before it, or written its results
            plgpu.barrier_wait(self.barriers["query_free"].at[stage])

        bounds, barrier = self.smem["bounds"], self.barriers["query"].at[stage]
        tile.store(self.config.numbers(bounds, stage))
        plgpu.barrier_arrive(barrier)
        for consumer in range(tiles.warpgroups):
            if self.config.scheduler.packed:
                starts = self.refs["start"].at[tile.batch_row, tile.row_group(consumer)]
                plgpu.copy_gmem_to_smem(starts, bounds.at[stage, consumer], barrier)
            for head in range(tiles.heads):
                rows = pl.ds(tile.first_position(consumer), positions)
                plgpu.copy_gmem_to_smem(
                    self.refs["query"].at[tile.batch_row, rows, tile.first_head + head],
                    self.smem["query"].at[stage, consumer, pl.ds(head * positions, positions)],
                    barrier,
                )

    def _keys(self, tile: WorkTile, fetched: Array) -> Array:
        """All tiles of keys and values; ``fetched`` counts those of the tiles before."""
        tiles = self.config.tiles
        counts = tile.key_tiles_of_runs
        for number, (run, begin) in enumerate(
            zip(self.refs["runs"], tile.begins_in_eights, strict=True)
        ):

            def step(n, fetched, number=number, run=run, begin=begin):
                stage = lax.rem(fetched, jnp.int32(tiles.slots))
                in_eights = begin + tile.fetched_tile(number, n) * (tiles.key // 8)
                keys = pl.ds(in_eights * 8, tiles.key)
                for name, ref in zip(("key", "value"), run, strict=True):
                    source = ref.at[tile.batch_row, keys, tile.kv_head]
                    self._into_stage(source, name, stage, fetched)
                return fetched + 1

            fetched = fori(0, counts[number], step, fetched)
        return fetched

    def _into_stage(self, source: Any, name: str, stage: Array, fetched: Array) -> None:
        @pl.when(fetched >= self.config.tiles.slots)
        def wait():  # until all consumers have read what the stage held
            plgpu.barrier_wait(self.barriers[name + "_free"].at[stage])

        plgpu.copy_gmem_to_smem(source, self.smem[name].at[stage], self.barriers[name].at[stage])

    def _sinks(self, tile: WorkTile, fetched: Array) -> None:
        """Tiles of sinks into their one stage: the shard's own ones, then those of other shards."""
        size = self.config.scheduler.sink_tile

        def step(n, _, run, begin, fetched):
            @pl.when(fetched + n > 0)
            def wait():  # until all consumers have read the tile of sinks before it
                plgpu.barrier_wait(self.barriers["sinks_free"])

            keys = pl.ds((begin + n * (size // 8)) * 8, size)
            for name, ref in zip(("sink_key", "sink_value"), run, strict=True):
                source = ref.at[tile.batch_row, keys, tile.kv_head]
                plgpu.copy_gmem_to_smem(source, self.smem[name], self.barriers["sinks"])

        assert tile.sinks is not None
        begin, num_own = tile.sinks.own_begin_in_eights, tile.sinks.num_own
        own_run = self.refs["runs"][self.config.scheduler.own]
        own = partial(step, run=own_run, begin=begin, fetched=fetched)
        fori(0, num_own, own, None)
        if self.config.has_fetched_sinks:
            fetched = fetched + num_own
            others = partial(step, run=self.refs["sinks"], begin=jnp.int32(0), fetched=fetched)
            fori(0, tile.sinks.num - num_own, others, None)
