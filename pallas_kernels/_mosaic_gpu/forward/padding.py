"""Zeroes the values of padding in shared memory, before the forward kernel multiplies by them.

Masks give padding the weight 0, but its values may be NaN. Only tiles that may hold padding are
written; tiles of queries whose keys have none have a loop without any of this.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Int

from pallas_kernels._mosaic_gpu.padding import is_padding, zero_padding
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._mosaic_gpu.tiles import MosaicTiles
from pallas_kernels._spec import Spec


def zeroes_in_kernel(spec: Spec, start: Array, tiles: MosaicTiles) -> bool:
    """Whether the kernel zeroes the values of padding itself.

    A warpgroup writes `ROWS` rows at a time, so neither shorter tiles of keys nor those of sinks.
    Three warpgroups have no registers left for it: ptxas would spill three times as many bytes.
    """
    fits = tiles.key % ROWS == 0 and tiles.warpgroups < 3
    return start.ndim > 0 and fits and not spec.num_sinks


def padding_operands(
    start: Int[Array, "B T"], first_key: int, tiles: MosaicTiles
) -> dict[str, Int[Array, "B _"]]:
    """What the kernel reads of padding; arguments as those of `is_padding`.

    "key_starts" are the rows' starts, for a tile more than there is. "padding" has the first row of
    padding and the end of the last one.
    """
    length, padding = start.shape[1], is_padding(start, first_key)
    row = jnp.arange(length, dtype=jnp.int32)[None]
    first = jnp.where(padding, row, length).min(axis=1)
    stop = jnp.where(padding, row + 1, 0).max(axis=1)
    # Rows behind the last one count as no padding: TMA fetches zeros for them.
    starts = jnp.pad(start, ((0, 0), (0, tiles.key)), constant_values=first_key)
    return {"key_starts": starts, "padding": jnp.stack([first, stop], axis=1)}


def has_padding(
    refs: dict[str, Any], batch_row: Int[Array, ""], begin: Int[Array, ""], count: Int[Array, ""]
) -> Bool[Array, ""]:
    """Whether there may be padding among so many rows of own keys, from the row ``begin`` on.

    Rows count as padding too where they are between padding.
    """
    first, stop = (refs["padding"][batch_row, n] for n in range(2))
    return (begin < stop) & (begin + count > first)


def zero_values(
    refs: dict[str, Any],
    values: Any,
    batch_row: Int[Array, ""],
    first_key: Int[Array, ""],
    spec: Spec,
) -> None:
    """Overwrites the padding of a tile of values; its first key has the position ``first_key``."""
    row = first_key - spec.first_key
    for part in range(0, values.shape[0], ROWS):
        starts = refs["key_starts"].at[batch_row, pl.ds(row + part, ROWS)]
        zero_padding([values.at[pl.ds(part, ROWS)]], starts, first_key + part)
