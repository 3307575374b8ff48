"""Tile sizes of the Mosaic GPU kernels, and the shared memory that they take."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class MosaicTiles:
    """Tiles of the Mosaic GPU forward kernel.

    A tile of queries has 64 rows for each of the ``warpgroups`` that compute: the same positions
    of ``heads`` heads of a group. ``slots`` tiles of ``key`` keys and values are in flight, and
    ``query_slots`` tiles of queries. Results have shared memory of their own if ``apart``, else
    that of their queries. With a ``lazy`` softmax sums are rescaled only where they must be.
    """

    key: int
    slots: int
    heads: int = 1
    query_slots: int = 1
    warpgroups: int = 2
    apart: bool = False
    lazy: bool = False

    def __post_init__(self):
        if self.key % 16 or not 16 <= self.key <= 256:
            raise ValueError(f"a key tile must be a multiple of 16 up to 256, got {self.key}")
        if (
            8 % self.heads
            or self.warpgroups not in (1, 2, 3)
            or min(self.slots, self.query_slots) < 1
        ):
            raise ValueError(f"no such launch: {self}")

    @property
    def positions(self) -> int:
        """Positions of a tile of queries."""
        return self.warpgroups * 64 // self.heads

    @property
    def registers(self) -> int:
        """Registers of a thread that computes: those that one which fetches does without."""
        return 160 if self.warpgroups == 3 else 240

    def shared_memory(self, head_dim: int, value_dim: int, *, whole: bool, sinks: bool) -> int:
        """Bytes of 16-bit queries, keys, values and results, and of a lazy softmax's sums."""
        rows = self.warpgroups * 64
        keys = self.slots * self.key + (MOSAIC_SINKS if sinks else 0)
        elements = self.query_slots * rows * head_dim + keys * (head_dim + value_dim)
        if not whole:
            elements += 2 * rows * 64
        elif self.apart:
            elements += rows * value_dim
        elif value_dim != head_dim:
            elements += rows * 64
        return 2 * elements + (4 * rows * FOLD if self.lazy else 0)


FOLD = 8
"""Columns of the narrowest matrix of a Mosaic GPU kernel: a thread has two numbers of a row."""


MOSAIC_SINKS = 16
"""Rows of a tile of sinks in the Mosaic GPU kernel."""


SHARED_MEMORY = 225 * 1024
"""Bytes that a Hopper GPU lends a block of threads, less some for barriers and log-sum-exps."""


def mosaic_tiles(
    head_dim: int, value_dim: int, window: int | None, group: int, *, whole: bool, sinks: bool
) -> MosaicTiles:
    """The tiles for these inputs: what won on an H100, as far as it fits into shared memory.

    Several heads of a group in a tile waste less at the edges of a window. ``whole`` says that no
    other launch begins or goes on from partial results.
    """
    dim = max(head_dim, value_dim)
    heads = math.gcd(8, group) if whole and window is not None and window < 2048 else 1
    lazy = dim > 64
    wanted = [MosaicTiles(64, 2, heads), MosaicTiles(32, 2, heads)]
    if lazy:
        wanted.insert(0, MosaicTiles(64, 2, heads, lazy=True))
    if dim <= 128:
        wanted.insert(0, MosaicTiles(128, 2, heads, apart=True, lazy=lazy))
    if dim <= 64 and window is not None and window < 256:
        reach = 192 // heads + window + 7
        key = min((80, 64, 48), key=lambda key: -(-reach // key) * key)
        wanted.insert(0, MosaicTiles(key, 3, heads, query_slots=2, warpgroups=3, apart=True))
    return next(
        tiles
        for tiles in wanted
        if tiles.shared_memory(head_dim, value_dim, whole=whole, sinks=sinks) <= SHARED_MEMORY
    )
