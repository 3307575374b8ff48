"""Arrays that vary over manual mesh axes: the one place of the kernels that knows of these."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Shaped


def full_like_varying(
    like: Shaped[Array, "..."], shape: tuple[int, ...], fill: float, dtype
) -> Shaped[Array, "..."]:
    """A constant array that varies over the same manual mesh axes as ``like``."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    full = jnp.full(shape, fill, dtype)
    return lax.pcast(full, axes, to="varying") if axes else full


def vary_as(like: Shaped[Array, "..."], x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """``x`` as an array that varies over the same manual mesh axes as ``like``.

    Kernels of Mosaic GPU know nothing of these axes: what they return varies over none, and so must
    a state that they go on from.
    """
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def shape_like_varying(
    like: Shaped[Array, "..."], shape: tuple[int, ...], dtype
) -> jax.ShapeDtypeStruct:
    """The type of an array that varies over the same manual mesh axes as ``like``."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
