"""Tile sizes of the Pallas-Triton kernels."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels._tiles import Tiles


@dataclasses.dataclass(frozen=True)
class TritonTiles(Tiles):
    """Tiles of a Triton kernel, the warps of a program and the depth of its load pipeline.

    ``clear`` gives tiles without masked entries a loop of their own, which pays where there are
    several of them in a row. ``heads`` is how many heads of a group a tile of queries holds at
    most, each with ``query`` rows.
    """

    warps: int
    stages: int
    clear: bool = True
    heads: int = 1

    def __post_init__(self):
        super().__post_init__()
        for name, size in (("query", self.query * self.heads), ("key", self.key)):
            if size < 16 or size & (size - 1):
                raise ValueError(f"a {name} tile must be a power of two from 16, got {size}")
        if self.warps not in (1, 2, 4, 8, 16) or self.stages < 1:
            raise ValueError(f"no such launch: {self.warps} warps, {self.stages} stages")

    def of_group(self, group: int) -> "TritonTiles":
        """The same tile with as many heads as a group has."""
        heads = math.gcd(self.heads, group)
        return dataclasses.replace(self, query=self.query * self.heads // heads, heads=heads)

    def fit(self, queries: int, keys: int) -> "TritonTiles":
        """No larger than the next power of two of what there is."""
        return dataclasses.replace(
            self,
            query=min(self.query, max(16, 1 << (queries - 1).bit_length())),
            key=min(self.key, max(16, 1 << (keys - 1).bit_length())),
        )


@dataclasses.dataclass(frozen=True)
class TritonPlan:
    """Tiles of the Triton kernels.

    With ``dvalue``, dkey and dvalue are computed in two launches: where one does not fit into
    registers, the logits are better computed twice.
    """

    forward: TritonTiles
    dquery: TritonTiles
    dkey: TritonTiles
    dvalue: TritonTiles | None = None

    def of_group(self, group: int) -> "TritonPlan":
        """The plan for so many query heads a key head."""
        return self._map(lambda tiles: tiles.of_group(group))

    def fit(self, rows: int) -> "TritonPlan":
        """The plan with no tile larger than a shard of ``rows`` asks for."""
        return self._map(lambda tiles: tiles.fit(rows, rows))

    def _map(self, function: Callable[[TritonTiles], TritonTiles]) -> "TritonPlan":
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return TritonPlan(**{name: x and function(x) for name, x in fields.items()})


def triton_plan(dtype, head_dim: int, value_dim: int, window: int | None, group: int) -> TritonPlan:
    """The plan for these inputs: what won in ``benchmarks.tiles`` on an H100.

    Several heads of a group in a tile waste less at the edges of a window; between them, more
    rows of one head are as fast or faster.
    """
    dim = max(head_dim, value_dim)
    clear = window is None or window >= 256
    short = window is not None and window < 2048
    if jnp.dtype(dtype).itemsize > 2:
        tiles = TritonTiles(32 if dim > 64 else 64, 32, 4, 2, clear)
        plan = TritonPlan(tiles, tiles, tiles, dvalue=tiles if dim > 128 else None)
    elif dim <= 64:
        plan = TritonPlan(
            TritonTiles(128, 64, 4, 3) if clear else TritonTiles(16, 32, 4, 3, clear, heads=8),
            TritonTiles(64, 32, 4, 3) if clear else TritonTiles(8, 32, 4, 3, clear, heads=8),
            TritonTiles(64, 64, 4, 3) if clear else TritonTiles(16, 64, 4, 3, clear, heads=4),
        )
    elif dim <= 128:
        packed = short and group % 8 == 0
        one_head = TritonTiles(64, 64, 4, 2, clear)
        dquery = TritonTiles(16, 32, 4, 3, clear, heads=8) if packed else one_head
        plan = TritonPlan(
            TritonTiles(16, 64, 8, 3, clear, heads=8)
            if packed
            else TritonTiles(128, 128 if window is None else 64, 8, 3, clear),
            TritonTiles(128, 64, 8, 3) if window is None else dquery,
            one_head if short else TritonTiles(16, 64, 4, 2, heads=4),
        )
    else:
        plan = TritonPlan(
            TritonTiles(128, 64, 8, 2, clear),
            TritonTiles(128, 32, 8, 3, clear),
            TritonTiles(64, 64, 4, 2, clear),
            dvalue=TritonTiles(64, 128, 8, 2, clear),
        )
    return plan.of_group(group)


def sink_tile(num_sinks: int) -> int:
    """Rows of a tile of sinks."""
    return min(64, max(16, 1 << (num_sinks - 1).bit_length()))
