"""Tile sizes, apart from the kernels that use them."""

import dataclasses
import heapq
import math
from collections.abc import Callable

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


def sink_tile(num_sinks: int) -> int:
    """Rows of a tile of sinks."""
    return min(64, max(16, 1 << (num_sinks - 1).bit_length()))


def fuses_backward(dim: int, window: int | None) -> bool:
    """Whether the fused Mosaic backward kernels are taken for faster ones, beside Triton's two.

    By windows where they won on an H100, without packing, and those where they lost: for heads of
    64 won at 1023 and lost at 511, of 96 won at 255, of 128 won at 255 and lost at 127, of 192 won
    at 127, of 256 at 255.
    """
    shortest = 1023 if dim <= 64 else 192 if dim <= 128 else 127
    return window is None or window >= shortest


def rounds_within_backward(window: int | None, packed: bool) -> bool:
    """Whether the fused Mosaic backward kernel rounds the gradients of queries it has added up.

    On an H100 that took 2 to 4% off the backward pass under a window, 8 to 18% off that of packed
    documents, and added 5% to it without a window.
    """
    return window is not None or packed


AROUND, HANDING = 3, 2
"""What it takes to begin and end a program of the fused backward kernel, and to hand its sums on to
another one, in tiles of queries: 7 and about 4 microseconds on an H100, where a tile takes 2.2.
Measured with heads of 128, and taken for wider ones too."""
PARTS = 8
"""Parts of a task at most."""


def cut_of_tasks(
    devices: list[list[int]], group: int, processors: int, some: set[int]
) -> tuple[int, int]:
    """How many of the last tasks of the fused backward kernel to cut, and into how many parts.

    A part has as many of a group's heads as another one. ``devices`` say how many tiles of queries
    a head has in each task, as if there were no documents; ``some`` or all tasks may be cut.
    Cutting must take a hundredth off the time, as a mean of the devices.
    """
    count = len(devices[0])

    def time(tiles, cut, parts):
        """When the last program ends: processors take the next one as soon as they have none."""
        whole = [n * group + AROUND for n in tiles[: count - cut]]
        parted = [n * group // parts + AROUND + HANDING for n in tiles[count - cut :]]
        free = [0] * processors
        for program in (*whole, *parted * parts):
            heapq.heapreplace(free, free[0] + program)
        return max(free)

    def mean(cut, parts):
        return sum(time(tiles, cut, parts) for tiles in devices) / len(devices)

    best, least = (0, 1), 0.99 * mean(0, 1)
    for cut in sorted({n for n in some if n < count} | {count}):
        for parts in (n for n in range(2, PARTS + 1) if group % n == 0):
            if (found := mean(cut, parts)) < least:
                best, least = (cut, parts), found
    return best
