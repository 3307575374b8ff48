"""Tile sizes, apart from the kernels that use them."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of a query tile and of a key tile."""

    query: int
    key: int

    def __post_init__(self):
        for name, size in (("query", self.query), ("key", self.key)):
            if size < 1:
                raise ValueError(f"a {name} tile must have at least one row, got {size}")


XLA = Tiles(query=256, key=256)


@dataclasses.dataclass(frozen=True)
class TritonTiles(Tiles):
    """Tiles of a Triton kernel, the warps of a program and the depth of its load pipeline.

    ``clear`` gives tiles without masked entries a loop of their own, which pays where there are
    several of them in a row.
    """

    warps: int
    stages: int
    clear: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name, size in (("query", self.query), ("key", self.key)):
            if size < 16 or size & (size - 1):
                raise ValueError(f"a {name} tile must be a power of two from 16, got {size}")
        if self.warps not in (1, 2, 4, 8, 16) or self.stages < 1:
            raise ValueError(f"no such launch: {self.warps} warps, {self.stages} stages")

    def fit(self, queries: int, keys: int) -> "TritonTiles":
        """No larger than the next power of two of what there is."""
        return dataclasses.replace(
            self,
            query=min(self.query, max(16, 1 << (queries - 1).bit_length())),
            key=min(self.key, max(16, 1 << (keys - 1).bit_length())),
        )


@dataclasses.dataclass(frozen=True)
class TritonPlan:
    """Tiles of the three Triton kernels.

    ``apart`` computes dkey and dvalue in two launches, where one would not fit into registers.
    """

    forward: TritonTiles
    dquery: TritonTiles
    dkey: TritonTiles
    apart: bool = False

    def fit(self, rows: int) -> "TritonPlan":
        """The plan with no tile larger than a shard of ``rows`` asks for."""
        return dataclasses.replace(
            self,
            forward=self.forward.fit(rows, rows),
            dquery=self.dquery.fit(rows, rows),
            dkey=self.dkey.fit(rows, rows),
        )


def triton_plan(dtype, head_dim: int, value_dim: int, window: int | None) -> TritonPlan:
    """The plan for these inputs, as measured on an H100 by ``benchmarks.tiles``."""
    dim = max(head_dim, value_dim)
    short = window is not None and window < 256
    if jnp.dtype(dtype).itemsize > 2:
        tile = TritonTiles(32, 32, 4, 2, clear=not short)
        if dim <= 64:
            tile = TritonTiles(64, 32, 4, 2, clear=not short)
        return TritonPlan(tile, tile, tile, apart=dim > 128)
    if dim <= 64:
        forward = TritonTiles(128, 64, 4, 3, clear=not short)
        return TritonPlan(
            forward, TritonTiles(64, 64, 4, 3, not short), TritonTiles(64, 64, 4, 3, not short)
        )
    if dim <= 128:
        return TritonPlan(
            TritonTiles(128, 128, 8, 3, not short),
            TritonTiles(128, 64, 8, 3, not short),
            TritonTiles(64, 128, 8, 3, not short),
        )
    return TritonPlan(
        TritonTiles(128, 64, 8, 2, not short),
        TritonTiles(64, 64, 8, 2, not short),
        TritonTiles(64, 64, 8, 2, not short),
        apart=True,
    )


def sink_tile(num_sinks: int) -> int:
    """Rows of a tile of fetched sinks."""
    return min(64, max(16, 1 << (num_sinks - 1).bit_length()))
