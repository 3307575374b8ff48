"""Products in the accumulator's precision, and the logits that both passes compute."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels._spec import Spec


def dot(
    spec: Spec, equation: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype
) -> Float[Array, "..."]:
    """An einsum with results of this dtype."""
    return jnp.einsum(equation, x, y, precision=spec.precision, preferred_element_type=dtype)


def scaled_logits(
    spec: Spec, query: Float[Array, "B K GQ H"], key: Float[Array, "B S K H"], groups: int, dtype
) -> tuple[Float[Array, "B K G Q S"], Float[Array, "B K G Q S"] | None]:
    """Scaled and capped logits, and the derivative of the cap (None without one)."""
    logits = dot(spec, "bkqh,bskh->bkqs", query, key, dtype) * spec.scale
    logits = logits.reshape(*query.shape[:2], groups, -1, key.shape[1])
    if spec.soft_cap is None:
        return logits, None
    bounded = jnp.tanh(logits / spec.soft_cap)
    return spec.soft_cap * bounded, 1 - bounded**2
