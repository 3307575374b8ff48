"""What the Mosaic GPU kernels share: layouts, shared memory and loops."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64
"""Rows of a warpgroup's matrices: what a WGMMA instruction has."""
MATRIX = plgpu.Layout.WGMMA
COLUMN = plgpu.Layout.WGMMA.reduce(1)
ROW = plgpu.Layout.WGMMA.reduce(0)


def swizzled(shape: tuple[int, ...], dtype, inner: int | None = None, columns: int | None = None):
    """SMEM that TMA writes and WGMMA reads.

    ``inner`` is the length of a product's inner axis, ``columns`` that of a part of each row.
    """
    size = jnp.dtype(dtype).itemsize

    def fits(swizzle):
        width = columns or shape[-1]
        return not width * size % swizzle and not (inner or 0) * size % swizzle

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


def wait_for(turn: Any, value: Array) -> None:
    """Waits until a counter in global memory has this value."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())))
    def wait(_, turn, value):
        ptr = utils.memref_ptr(turn)
        utils.SemaphoreRef(ptr).wait(value.registers[()], decrement=False, memory_scope="gpu")
        utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)

    wait(turn, value)


def add_one(turn: Any) -> None:
    """Adds one to a counter in global memory, after all that this thread has written."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def add(_, turn):
        utils.SemaphoreRef(utils.memref_ptr(turn)).signal(1, memory_scope="gpu")

    add(turn)
