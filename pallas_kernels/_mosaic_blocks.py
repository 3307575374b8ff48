"""What the Mosaic GPU kernels share: layouts, shared memory and loops."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64
"""Rows of a warpgroup's matrices: what a WGMMA instruction has."""
MATRIX = plgpu.Layout.WGMMA
COLUMN = plgpu.Layout.WGMMA.reduce(1)


def swizzled(shape: tuple[int, ...], dtype, inner: int | None = None):
    """SMEM that TMA writes and WGMMA reads; ``inner`` is the length of a product's inner axis."""
    size = jnp.dtype(dtype).itemsize

    def fits(swizzle):
        return not shape[-1] * size % swizzle and not (inner or 0) * size % swizzle

    swizzle = next(filter(fits, (128, 64, 32)))
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref: Any, layout) -> Array:
    """All of a ref."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # jax 0.10's


def spread(x: Array, width: int) -> Array:
    """A column as a matrix of equal columns."""
    return lax.broadcast_in_dim(x, (ROWS, width), [0])


def fori(begin, end, body, carry):
    """A loop whose bounds may be Python's integers."""
    return lax.fori_loop(jnp.int32(begin), jnp.int32(end), body, carry)
