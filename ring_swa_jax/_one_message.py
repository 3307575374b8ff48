"""Keys and the gradients of keys in one message.

XLA overlaps only one message at a time with a kernel.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Shaped, UInt16

from pallas_kernels import accumulator_dtype


def packed(
    keys: Float[Array, "B T K D"], sums: Float[Array, "B T K D"]
) -> Shaped[Array, "B T K packed"]:
    """Keys and their float32 gradients as one message."""
    return jnp.concatenate(
        [keys, sums] if keys.dtype == sums.dtype else [_bits(keys), _bits(sums)], -1
    )


def unpacked(
    message: Shaped[Array, "B T K packed"], keys: Float[Array, "B T K D"]
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """The inverse of `packed`, for keys like these."""
    first, second = message[..., : keys.shape[-1]], message[..., keys.shape[-1] :]
    if message.dtype == keys.dtype:
        return first, second
    pairs = second.reshape(*keys.shape, 2)
    return (
        lax.bitcast_convert_type(first, keys.dtype),
        lax.bitcast_convert_type(pairs, accumulator_dtype(keys.dtype)),
    )


def _bits(x: Float[Array, "B T K D"]) -> UInt16[Array, "B T K bits"]:
    return lax.bitcast_convert_type(x, jnp.uint16).reshape(*x.shape[:-1], -1)
