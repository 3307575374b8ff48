"""Slices at a traced index that stay slices under ``jax.vmap``.

JAX's own rule makes a gather or a scatter of them, which XLA compiles into several loops.
"""

from collections.abc import Callable

import jax
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jaxtyping import Int, Shaped

Index = Int[Array, ""] | int


def slice_in_dim(
    x: Shaped[Array, "..."], begin: Index, size: int, axis: int = 0
) -> Shaped[Array, "..."]:
    """``lax.dynamic_slice_in_dim``."""

    def along(axis):
        return lambda x, begin: lax.dynamic_slice_in_dim(x, begin, size, axis)

    return _sharing_the_index(along, axis)(x, begin)


def update_in_dim(
    x: Shaped[Array, "..."], new: Shaped[Array, "..."], begin: Index, axis: int = 0
) -> Shaped[Array, "..."]:
    """``lax.dynamic_update_slice_in_dim``."""

    def along(axis):
        return lambda x, new, begin: lax.dynamic_update_slice_in_dim(x, new, begin, axis)

    return _sharing_the_index(along, axis)(x, new, begin)


def _sharing_the_index(along: Callable[[int], Callable], axis: int) -> Callable:
    """``along(axis)`` of arrays and an index; where the index is mapped too, by JAX's rule."""
    call = custom_vmap(along(axis))

    @call.def_vmap
    def rule(size, is_mapped, *arguments):
        *arrays_mapped, index_mapped = is_mapped
        if index_mapped or not all(arrays_mapped):
            axes = [0 if mapped else None for mapped in is_mapped]
            return jax.vmap(along(axis), in_axes=axes, axis_size=size)(*arguments), True
        return _sharing_the_index(along, axis + 1)(*arguments), True

    return call
