"""Dependencies that say in which order a program computes things."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def exists(number: Float[Array, ""]) -> Bool[Array, ""]:
    """True, whatever the number is, NaN too; XLA does not know that.

    So what depends on it comes after the number.
    """
    return (number <= jnp.inf) | jnp.isnan(number)
