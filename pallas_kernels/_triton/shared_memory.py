"""Bytes of shared memory that the compiler gives the Pallas-Triton kernels.

The compiler says so only when a kernel asks for too much, by failing. These are its rules, read off
from what it asked for with jax 0.11.2 and 0.12.0: never less, and hardly ever more than that
(`tests/pallas_kernels/triton/test_shared_memory.py` compares the two).

A kernel holds the tile that its program is for, and streams tiles of the other side through a
pipeline of buffers. How many buffers there are depends on the matrix instructions:

* ``mma.sync`` (compute capabilities 8.x and 12.x) copies operands to registers, so the tile in use
  needs no buffer: ``stages - 1`` of them. Its result goes through shared memory on the way to a
  second product whose columns outnumber the held rows.
* ``wgmma`` (9.0) reads operands from shared memory while it runs: ``stages`` buffers. The second
  product takes the first one's result from registers.
* ``tcgen05.mma`` (10.x) as ``wgmma``, and one buffer more for a tile that two products read.

The latter two need 64 rows; smaller tiles are left to ``mma.sync``. IEEE products of float32 have
no matrix instructions: the result of each first product goes through shared memory.
"""

from typing import NamedTuple

from jax.experimental import pallas as pl

from pallas_kernels._triton.blocks import head_parts
from pallas_kernels._triton.tiles import TritonTiles

BARRIERS = 64
"""Bytes of the barriers of ``tcgen05.mma`` and of the address of its tensor memory, at most."""


class Streamed(NamedTuple):
    """An array of heads that a kernel streams.

    Attributes:
        dim: size of a head.
        summed: whether a product sums over the head.
        products: how many products read a tile.
    """

    dim: int
    summed: bool
    products: int


class Operands(NamedTuple):
    """What a kernel keeps in shared memory.

    Attributes:
        held: sizes of the heads whose rows it holds.
        streamed: the arrays of heads that it streams.
        vectors: how many 4-byte numbers it streams with each row.
        sums: sizes of the heads of its results.
        weights: how many results of first products go into second ones.
    """

    held: tuple[int, ...]
    streamed: tuple[Streamed, ...]
    vectors: int
    sums: tuple[int, ...]
    weights: int = 1


def operands(kernel: str, head_dim: int, value_dim: int) -> Operands:
    """Of a kernel: "forward", "dquery", "dkey_dvalue", "dkey" or "dvalue"."""
    h, v = head_dim, value_dim
    # Queries come with lse and delta, and tokens of packed sequences with the starts of these.
    return {
        "forward": Operands((h,), (Streamed(h, True, 1), Streamed(v, False, 1)), 1, (v,)),
        "dquery": Operands((h, v), (Streamed(h, True, 2), Streamed(v, True, 1)), 1, (h,)),
        "dkey_dvalue": Operands((h, v), (Streamed(h, True, 2), Streamed(v, True, 2)), 3, (h, v), 2),
        "dkey": Operands((h, v), (Streamed(h, True, 2), Streamed(v, True, 1)), 3, (h,)),
        "dvalue": Operands((h,), (Streamed(h, True, 1), Streamed(v, False, 1)), 2, (v,)),
    }[kernel]


def shared_memory(
    kernel: str,
    tiles: TritonTiles,
    head_dim: int,
    value_dim: int,
    *,
    itemsize: int,
    capability: float,
) -> int:
    """Bytes that one program of a kernel asks for, at most.

    Args:
        kernel: as `operands` names it.
        tiles: its tiles, of at least two stages.
        head_dim: of queries and keys.
        value_dim: of values.
        itemsize: bytes of an element of queries, keys and values.
        capability: compute capability of the GPU.
    """
    held_rows, streamed_rows = tiles.query * tiles.heads, tiles.key
    if kernel not in ("forward", "dquery"):
        held_rows, streamed_rows = streamed_rows, held_rows
    need = operands(kernel, head_dim, value_dim)
    held = held_rows * sum(need.held) * itemsize
    row = streamed_rows * itemsize
    vectors = (tiles.stages - 1) * streamed_rows * need.vectors * 4
    without = held + vectors + (tiles.stages - 1) * row * sum(x.dim for x in need.streamed)
    # The forward kernel also passes a number a row on, its rescaling.
    ieee = without + need.weights * held_rows * row + (held_rows * 4 if kernel == "forward" else 0)
    if held_rows < 64 or int(capability) in (8, 12):
        weights = held_rows * row if held_rows < max(need.sums) else 0
        return ieee if itemsize == 4 else without + weights
    more = int(capability) != 9  # tcgen05.mma
    streamed = sum(row * x.dim * _buffers(x, tiles.stages, more) for x in need.streamed)
    # Large arrays are aligned to 1024 bytes, and vectors lie between them.
    small = pl.cdiv(vectors, 1024) * 1024 + (1024 + BARRIERS if more else 0)
    # A precision below IEEE's takes matrix instructions for float32 too.
    return max(held + streamed + small, ieee if itemsize == 4 else 0)


def _buffers(x: Streamed, stages: int, more: bool) -> int:
    """Tiles in flight where products read them from shared memory."""
    if not more:
        return stages
    # Products that add up over the parts of a head wait for each other, one tile earlier.
    split = x.summed and len(head_parts(x.dim)) > 1
    return stages + (x.products - 1) - split
