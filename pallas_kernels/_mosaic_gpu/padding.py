"""Sets padding rows to zero, in arrays or in shared memory, whatever they hold there.

Row i is padding if its sequence starts behind its own key, ``start > i + first_key`` (`Spec`); the
masks give padding no weight. But zero times NaN is NaN, so the queries, keys, values and output
gradients of padding must be zero before a matrix product reads them. Few tiles have padding. Each
warpgroup that reads such a tile zeroes the tile's padding itself: several warpgroups may write the
same zeros.
"""

import dataclasses
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
    Index,
    broadcast_column,
    load_as,
    opaque_to_compiler,
)
from pallas_kernels._spec import KeyRun, Spec, plus

FLAG_WIDTH = 32
"""Copies of each tile's flag in int32, because TMA needs multiples of 128 bytes."""


SLICE_COLUMNS = 64
"""Columns that `zero_padding` overwrites at a time: those of the widest swizzle."""


def is_padding(start: Int[Array, "B T"], first_key: int = 0) -> Bool[Array, "B T"]:
    """Whether a row is padding; the position of the shard's first key is ``first_key``."""
    own_keys = jnp.arange(start.shape[1], dtype=start.dtype)[None]
    return start > plus(own_keys, first_key)


def with_zero_padding(
    spec: Spec, runs: tuple[KeyRun, ...], start: Int[Array, "B T"], names: tuple[str, ...]
) -> tuple[KeyRun, ...]:
    """The runs with zeros in the padding of the shard's own "key" or "value", or of both.

    The padding of a halo is zeros already: its sender sees to that (`Halo.fetch`).
    """
    padding = is_padding(start, spec.first_key)[..., None, None]

    def with_zeros(run):
        return dataclasses.replace(
            run, **{n: jnp.where(padding, 0, getattr(run, n)) for n in names}
        )

    return tuple(with_zeros(run) if run.offset == spec.first_key else run for run in runs)


def padding_flags(start: Int[Array, "B T"], first_key: int = 0) -> Int[Array, "B tiles 32"]:
    """Whether a tile of `ROWS` rows has padding; arguments as those of `is_padding`."""
    batch, length = start.shape
    padding = jnp.pad(is_padding(start, first_key), ((0, 0), (0, -length % ROWS)))
    flags = padding.reshape(batch, -1, ROWS).any(-1).astype(jnp.int32)
    return jnp.broadcast_to(flags[..., None], (*flags.shape, FLAG_WIDTH))


def zero_delta(
    start: Int[Array, "B T"], delta: Float[Array, "B N R"], first_key: int = 0
) -> Float[Array, "B N R"]:
    """``delta`` of the first R queries, with zeros for padding; the others as `is_padding`'s."""
    padding = is_padding(start[:, : delta.shape[2]], first_key)
    return jnp.where(padding[:, None], 0, delta)


def zero_padding(tiles: list[Any], starts: Any, first: Index) -> None:
    """Overwrites the padding of tiles in shared memory with zeros.

    Args:
        tiles: refs of `ROWS` rows.
        starts: ref of the rows' starts, in shared or global memory.
        first: position of the first row's own key.
    """
    starts = load_as(starts, COLUMN)
    for tile in tiles:
        # A slice of columns at a time, because registers are scarce.
        columns = SLICE_COLUMNS if tile.shape[1] % SLICE_COLUMNS == 0 else tile.shape[1]
        for column in range(0, tile.shape[1], columns):
            part = tile.at[:, pl.ds(column, columns)]
            i = plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), 0, layout=MATRIX)
            i = i * opaque_to_compiler(1) + first
            x, seen = load_as(part, MATRIX), broadcast_column(starts, columns) <= i
            part[...] = jnp.where(seen, x, jnp.zeros((), x.dtype))
    # Waits for all warps of the warpgroup, and makes the zeros visible to WGMMA and TMA.
    plgpu.commit_smem()
