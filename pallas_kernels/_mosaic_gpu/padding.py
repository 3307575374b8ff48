"""Rows of padding among documents: they count as zeros, whatever they hold.

A padding row has ``start > i``, and masks give it no weight. But zero times NaN is NaN, so its
queries, keys, values and gradients of outputs must be zeros before they are factors of a product.
Tiles with padding are few. The warpgroups that read such a tile overwrite its padding in shared
memory, each on its own: all of them write the same zeros.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Int

from pallas_kernels._mosaic_gpu.primitives import (
    COLUMN,
    MATRIX,
    ROWS,
    broadcast_column,
    load_as,
    opaque_to_compiler,
)

FLAG_WIDTH = 32
"""Copies of a tile's flag: TMA writes to multiples of 128 bytes."""


SLICE_COLUMNS = 64
"""Columns that are overwritten at a time: those of the widest swizzle."""


def is_padding(start: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether a row is padding."""
    return start > jnp.arange(start.shape[1], dtype=start.dtype)[None]


def padding_flags(start: Int[Array, "B T"]) -> Int[Array, "B tiles 32"]:
    """Whether a tile of `ROWS` rows has padding."""
    batch, length = start.shape
    padding = jnp.pad(is_padding(start), ((0, 0), (0, -length % ROWS)))
    flags = padding.reshape(batch, -1, ROWS).any(-1).astype(jnp.int32)
    return jnp.broadcast_to(flags[..., None], (*flags.shape, FLAG_WIDTH))


def zero_delta(start: Int[Array, "B T"], delta: Float[Array, "B N R"]) -> Float[Array, "B N R"]:
    """``delta`` of the first R queries, zero for padding."""
    padding = is_padding(start[:, : delta.shape[2]])
    return jnp.where(padding[:, None], 0, delta)


def zero_padding(tiles: list[Any], starts: Any, first: Int[Array, ""]) -> None:
    """Overwrites the padding of tiles in shared memory with zeros.

    Args:
        tiles: refs of `ROWS` rows.
        starts: ref of the rows' starts, in shared or global memory.
        first: position of the first row.
    """
    starts = load_as(starts, COLUMN)
    for tile in tiles:
        # Some columns at a time: registers are scarce.
        columns = SLICE_COLUMNS if tile.shape[1] % SLICE_COLUMNS == 0 else tile.shape[1]
        for column in range(0, tile.shape[1], columns):
            part = tile.at[:, pl.ds(column, columns)]
            i = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 0, layout=MATRIX)
            i = i * opaque_to_compiler(1) + first
            x, seen = load_as(part, MATRIX), broadcast_column(starts, columns) <= i
            part[...] = jnp.where(seen, x, jnp.zeros((), x.dtype))
    # Waits for all warps of the warpgroup, and makes the zeros visible to WGMMA and TMA.
    plgpu.commit_smem()
