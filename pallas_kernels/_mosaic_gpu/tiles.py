"""Tile sizes of the forward kernel in Mosaic GPU, and the shared memory that they take.

Those of the backward kernels are constants of their modules.
"""

import dataclasses
import math

from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class MosaicTiles:
    """Tiles of the Mosaic GPU forward kernel.

    Attributes:
        key: rows of a tile of keys and of a tile of values.
        slots: tiles of keys, and of values, in shared memory.
        heads: query heads of one key head that share a tile of queries.
        query_slots: tiles of queries in shared memory.
        warpgroups: consumer warpgroups. Each has 64 rows of a tile of queries: the same positions
            of each of the ``heads``.
        separate_out: a tile's whole results have shared memory of their own.
        lazy_rescale: sums are rescaled only where a maximum has grown much (`OnlineSoftmax`).
    """

    key: int
    slots: int
    heads: int = 1
    query_slots: int = 1
    warpgroups: int = 2
    separate_out: bool = False
    lazy_rescale: bool = False

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
        """Registers of a consumer's thread; the producer keeps 24 of its own.

        A multiprocessor has 512 for each thread of a warpgroup: 3 * 160 + 24 and 2 * 240 + 24 fit.
        """
        return 160 if self.warpgroups == 3 else 240

    def shared_memory(self, head_dim: int, value_dim: int, *, whole: bool, sinks: bool) -> int:
        """Bytes of 16-bit queries, keys, values and results, and of a lazy softmax's sums.

        ``whole`` is that of `mosaic_tiles`; ``sinks`` says whether there is a tile of sinks.
        """
        rows = self.warpgroups * 64
        keys = self.slots * self.key + (MOSAIC_SINKS if sinks else 0)
        elements = self.query_slots * rows * head_dim + keys * (head_dim + value_dim)
        # Results go out 64 columns at a time, at most (`ForwardConfig.out_columns`): of 32 bits in
        # a launch that is not whole.
        if not whole:
            elements += 2 * rows * 64
        elif self.separate_out:
            elements += rows * value_dim
        elif value_dim != head_dim:
            elements += rows * 64
        return 2 * elements + (4 * rows * FOLD if self.lazy_rescale else 0)


FOLD = 8
"""Columns of the narrowest matrix of a Mosaic GPU kernel: a thread has two numbers of a row."""


MOSAIC_SINKS = 16
"""Rows of a tile of sinks in the Mosaic GPU kernel."""


SHARED_MEMORY = 225 * 1024
"""Bytes for tiles: what a block of threads may use on Hopper, less 2 KiB for barriers and lse."""


def mosaic_tiles(
    head_dim: int, value_dim: int, window: int | None, group_size: int, *, whole: bool, sinks: bool
) -> MosaicTiles:
    """The tiles for these inputs: the fastest of those tried on an H100 80GB that fit.

    Under a window several heads share a tile of queries. Such a tile has fewer positions, so fewer
    of its keys are masked at the edges of the window.

    Args:
        head_dim: H.
        value_dim: Hv.
        window: keys before a query that it sees, or None.
        group_size: query heads of a key head.
        whole: the launch neither continues partial results nor leaves any.
        sinks: whether there are sink tokens that windows do not reach.
    """
    dim = max(head_dim, value_dim)
    heads = math.gcd(8, group_size) if whole and window is not None and window < 2048 else 1
    lazy = dim > 64
    candidates = [MosaicTiles(64, 2, heads), MosaicTiles(32, 2, heads)]
    if lazy:
        candidates.insert(0, MosaicTiles(64, 2, heads, lazy_rescale=True))
    if dim <= 128:
        candidates.insert(0, MosaicTiles(128, 2, heads, separate_out=True, lazy_rescale=lazy))
    if dim <= 64 and window is not None and window < 256:
        # All keys that a tile of queries sees, from a multiple of 8 on.
        keys = 192 // heads + window + 7
        key = min((80, 64, 48), key=lambda key: pl.cdiv(keys, key) * key)
        short = MosaicTiles(key, 3, heads, query_slots=2, warpgroups=3, separate_out=True)
        candidates.insert(0, short)
    return next(
        tiles
        for tiles in candidates
        if tiles.shared_memory(head_dim, value_dim, whole=whole, sinks=sinks) <= SHARED_MEMORY
    )
