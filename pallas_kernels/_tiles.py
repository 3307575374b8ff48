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


def xla_tiles(window: int | None) -> Tiles:
    """About as long as the window, so that the two edges of a range are not most of it."""
    reach = 256 if window is None else window + 1
    size = min(256, max(64, 1 << (reach - 1).bit_length()))
    return Tiles(size, size)


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
    """Tiles of the Triton kernels.

    With ``dvalue``, dkey and dvalue are computed in two launches: where one does not fit into
    registers, the logits are better computed twice.
    """

    forward: TritonTiles
    dquery: TritonTiles
    dkey: TritonTiles
    dvalue: TritonTiles | None = None

    def fit(self, rows: int) -> "TritonPlan":
        """The plan with no tile larger than a shard of ``rows`` asks for."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return TritonPlan(**{name: x and x.fit(rows, rows) for name, x in fields.items()})


def triton_plan(dtype, head_dim: int, value_dim: int, window: int | None) -> TritonPlan:
    """The plan for these inputs: what won in ``benchmarks.tiles`` on an H100."""
    dim = max(head_dim, value_dim)
    clear = window is None or window >= 256
    if jnp.dtype(dtype).itemsize > 2:
        tiles = TritonTiles(32 if dim > 64 else 64, 32, 4, 2, clear)
        return TritonPlan(tiles, tiles, tiles, dvalue=tiles if dim > 128 else None)
    if dim <= 64:
        return TritonPlan(
            TritonTiles(128 if clear else 64, 64, 4, 3, clear),
            TritonTiles(64, 32, 4, 3, clear),
            TritonTiles(64, 64, 4, 3, clear),
        )
    if dim <= 128:
        # A small tile wastes less at the edges of a window, a large one is faster between.
        return TritonPlan(
            TritonTiles(128, 128 if window is None else 64, 8, 3, clear),
            TritonTiles(64, 64, 4, 2, clear)
            if window is not None and window < 2048
            else TritonTiles(128, 64, 8, 3, clear),
            TritonTiles(64, 64, 4, 2, clear),
        )
    return TritonPlan(
        TritonTiles(128, 64, 8, 2, clear),
        TritonTiles(128, 32, 8, 3, clear),
        TritonTiles(64, 64, 4, 2, clear),
        dvalue=TritonTiles(64, 128, 8, 2, clear),
    )


def sink_tile(num_sinks: int) -> int:
    """Rows of a tile of fetched sinks."""
    return min(64, max(16, 1 << (num_sinks - 1).bit_length()))
