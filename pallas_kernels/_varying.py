"""Arrays that vary over manual mesh axes, those of the surrounding shard_maps."""

from collections.abc import Hashable, Set

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Shaped


def varying_axes(x: Shaped[Array, "..."]) -> frozenset[Hashable]:
    """The manual mesh axes over which x varies."""
    return jax.typeof(x).manual_axis_type.varying


def vary_over(x: Shaped[Array, "*shape"], axes: Set[Hashable]) -> Shaped[Array, "*shape"]:
    """``x``, cast to vary over these manual mesh axes too."""
    missing = tuple(sorted(axes - varying_axes(x), key=str))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_as(like: Shaped[Array, "..."], x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """``x`` as an array that varies over the same manual mesh axes as ``like``.

    Kernels of Mosaic GPU know nothing of these axes: what they return varies over none, and so must
    a state that they go on from.
    """
    return vary_over(x, varying_axes(like))


def full_like_varying(
    like: Shaped[Array, "..."], shape: tuple[int, ...], fill: float, dtype
) -> Shaped[Array, "..."]:
    """A constant array that varies over the same manual mesh axes as ``like``."""
    return vary_as(like, jnp.full(shape, fill, dtype))


def shape_like_varying(
    like: Shaped[Array, "..."], shape: tuple[int, ...], dtype
) -> jax.ShapeDtypeStruct:
    """The type of an array that varies over the same manual mesh axes as ``like``."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
