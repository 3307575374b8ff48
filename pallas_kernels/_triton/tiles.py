"""Tile sizes of the Pallas-Triton kernels."""

import dataclasses
import math

from pallas_kernels._tiles import Tiles


@dataclasses.dataclass(frozen=True)
class TritonTiles(Tiles):
    """Tiles of a Triton kernel, the warps of a program and the depth of its load pipeline.

    ``unmasked_loop`` gives unmasked tiles a loop of their own, which pays where there are
    several of them in a row. ``heads`` is how many heads of a group a tile of queries holds at
    most, each with ``query`` rows.
    """

    warps: int
    stages: int
    unmasked_loop: bool = True
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
    registers, the logits are better computed twice. ``sinks`` is for the launches that compute
    sinks' gradients, by tiles of sinks; None without any.
    """

    forward: TritonTiles
    dquery: TritonTiles
    dkey: TritonTiles
    dvalue: TritonTiles | None = None
    sinks: TritonTiles | None = None

    def kernels(self) -> dict[str, TritonTiles]:
        """The tiles of each kernel, named as in `shared_memory`; "sinks" is a "dkey_dvalue"."""
        named = {
            "forward": self.forward,
            "dquery": self.dquery,
            "dkey_dvalue" if self.dvalue is None else "dkey": self.dkey,
            "dvalue": self.dvalue,
            "sinks": self.sinks,
        }
        return {name: tiles for name, tiles in named.items() if tiles is not None}


def sink_tile(num_sinks: int) -> int:
    """Rows of a tile of sinks."""
    return min(64, max(16, 1 << (num_sinks - 1).bit_length()))
