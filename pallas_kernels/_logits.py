"""Logits in base 2, as all kernels of ours compute their softmax."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels._spec import Spec


def delta_of(
    out: Float[Array, "B R N Hv"], dout: Float[Array, "B R N Hv"], dtype
) -> Float[Array, "B N R"]:
    """``sum(out * dout)`` over the values' columns, [B, N, T]."""
    return jnp.moveaxis((out.astype(dtype) * dout.astype(dtype)).sum(-1), 1, 2)


LOG2_E = 1.4426950408889634


LOWEST = -1e30
"""Stands for -inf where a difference of two must be a number."""


def cap_logits(
    spec: Spec, products: Float[Array, "*pairs"]
) -> tuple[Float[Array, "*pairs"], float, Float[Array, "*pairs"] | None]:
    """Logits, the positive factor that takes them to base 2, and the derivative of the cap."""
    if spec.soft_cap is not None:
        bounded = jnp.tanh(products * (spec.scale / spec.soft_cap))
        return bounded, spec.soft_cap * LOG2_E, 1 - bounded * bounded
    if spec.scale > 0:
        return products, spec.scale * LOG2_E, None
    return products * spec.scale, LOG2_E, None
