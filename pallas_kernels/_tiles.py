"""Tile sizes, apart from the kernels that use them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of a query tile and of a key tile."""

    query: int
    key: int

    def __post_init__(self):
        for name, size in (("query", self.query), ("key", self.key)):
            if size < 1:
                raise ValueError(f"a {name} tile must have at least one row, got {size}")
