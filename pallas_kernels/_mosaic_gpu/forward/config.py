"""What the parts of the forward kernel share: static settings, shared memory and barriers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._mosaic_gpu.forward.scheduler import TileScheduler
from pallas_kernels._mosaic_gpu.forward.work_tile import WorkTile
from pallas_kernels._mosaic_gpu.primitives import ROWS, swizzled
from pallas_kernels._mosaic_gpu.tiles import FOLD, MosaicTiles
from pallas_kernels._spec import Spec


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Static settings of a launch.

    Attributes:
        spec: settings of the attention.
        scheduler: which program takes which tiles.
        tiles: tile sizes.
        dim: head dim of queries and keys.
        value_dim: of values.
        dtype: of queries, keys and values.
        out_dtype: of the output.
        resume: whether the launch continues from a state.
        has_fetched_sinks: whether there are sinks from other shards.
        has_sink_logits: whether there are learned sinks.
    """

    spec: Spec
    scheduler: TileScheduler
    tiles: MosaicTiles
    dim: int
    value_dim: int
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    resume: bool
    has_fetched_sinks: bool
    has_sink_logits: bool

    @property
    def is_whole(self) -> bool:
        """No other launch begins or goes on from this one's results."""
        return self.out_dtype == self.dtype and not self.resume

    @property
    def out_in_query_smem(self) -> bool:
        """A tile's results take the shared memory of its queries."""
        return self.is_whole and self.value_dim == self.dim and not self.tiles.separate_out

    @property
    def out_columns(self) -> int:
        """Columns of the output that are in shared memory at a time."""
        if self.out_in_query_smem or (self.is_whole and self.tiles.separate_out):
            return self.value_dim
        return next(width for width in (64, 48, 32, 16) if self.value_dim % width == 0)

    def smem(self) -> dict[str, Any]:
        """Shared memory: tiles of queries, keys, values and sinks, and a warpgroup's results.

        Beside a tile of queries "bounds" has the starts of each warpgroup's rows, where documents
        make them differ, and then the numbers of the `WorkTile`.
        """
        tiles, consumers = self.tiles, self.tiles.warpgroups
        smem = {
            "query": swizzled((tiles.query_slots, consumers, ROWS, self.dim), self.dtype),
            "key": swizzled((tiles.slots, tiles.key, self.dim), self.dtype),
            "value": swizzled((tiles.slots, tiles.key, self.value_dim), self.dtype, tiles.key),
            "lse": plgpu.SMEM((consumers, ROWS), jnp.float32),
        }
        rows = consumers + WorkTile.rows_of_numbers(self.scheduler)
        smem["bounds"] = plgpu.SMEM((tiles.query_slots, rows, ROWS), jnp.int32)
        if not self.out_in_query_smem:
            smem["out"] = swizzled((consumers, ROWS, self.out_columns), self.out_dtype)
        if tiles.lazy_rescale:
            smem["sums"] = plgpu.SMEM((consumers, ROWS, FOLD), jnp.float32)
        if size := self.scheduler.sink_tile:
            smem["sink_key"] = swizzled((size, self.dim), self.dtype)
            smem["sink_value"] = swizzled((size, self.value_dim), self.dtype, size)
        return smem

    def numbers(self, bounds: Any, stage: Any) -> Any:
        """Where in "bounds" the numbers of a stage's `WorkTile` are."""
        rows = WorkTile.rows_of_numbers(self.scheduler)
        return bounds.at[stage, pl.ds(self.tiles.warpgroups, rows)]

    def barriers(self) -> dict[str, Any]:
        """Barriers, one for each stage.

        TMA arrives at "query", "key", "value", "sinks" and "state" when a copy is over, and
        consumers wait. At "query" the producer arrives too, when it has stored a tile's numbers.
        Each consumer warpgroup arrives at a "..._free" barrier when it no longer reads a stage, and
        the producer waits before it fills the stage again.
        """
        tiles, consumers = self.tiles, self.tiles.warpgroups
        copies = consumers * (tiles.heads + self.scheduler.packed)
        barriers = {
            "query": plgpu.Barrier(num_arrivals=copies + 1, num_barriers=tiles.query_slots),
            "query_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=tiles.query_slots),
        }
        for name in ("key", "value"):
            barriers[name] = plgpu.Barrier(num_barriers=tiles.slots)
            barriers[name + "_free"] = plgpu.Barrier(
                num_arrivals=consumers, num_barriers=tiles.slots
            )
        if self.resume:
            barriers["state"] = plgpu.Barrier(num_arrivals=tiles.heads, num_barriers=consumers)
        if self.scheduler.sink_tile:
            barriers["sinks"] = plgpu.Barrier(num_arrivals=2)
            barriers["sinks_free"] = plgpu.Barrier(num_arrivals=consumers)
        return barriers
