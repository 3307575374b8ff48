"""How a model lies on a mesh of the axes "data" and "seq".

Tokens are cut over both. Every matrix, its gradient and the optimizer's moments are cut over both
axes together (ZeRO's third stage, fully sharded data parallelism), whatever the attention does;
vectors are on every device. A layer gathers its matrices in its computing dtype, forward and
backward, and their gradients are summed straight into the devices' parts.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

AXES = ("data", "seq")
TOKENS = P(*AXES)


def spec_of(shape: tuple[int, ...], axis: int | None = None) -> P:
    """Cuts the longest dimension that the devices divide, or the one that is named."""
    sizes = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(sizes[name] for name in AXES)
    if len(shape) < 2:
        return P()
    if axis is None:
        fitting = [n for n, size in enumerate(shape) if size % devices == 0]
        if not fitting:
            raise ValueError(f"{devices} devices divide no dimension of a matrix {shape}")
        axis = max(fitting, key=lambda n: shape[n])
    return P(*(AXES if n == axis else None for n in range(len(shape))))


def whole(x: Array) -> Array:
    """The same array on every device."""
    return jax.lax.with_sharding_constraint(x, P())


def cut_over_devices(x: Array, axis: int | None = None) -> Array:
    """A matrix, cut over all devices."""
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, axis))


def tokens_cut(x: Array) -> Array:
    """An array [B, S, ...], cut as the tokens are."""
    return jax.lax.with_sharding_constraint(x, TOKENS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: Array, dtype: jnp.dtype) -> Array:
    """A matrix on every device, in the dtype of the computation; its gradient is cut again."""
    # The barrier keeps XLA from gathering float32 and narrowing it afterwards.
    return whole(lax.optimization_barrier(x.astype(dtype)))


def _gathered_forward(x, dtype):
    # An empty array tells the backward pass the dtype.
    return gathered(x, dtype), jnp.zeros((0,), x.dtype)


def _gathered_backward(dtype, like, dx):
    return (cut_over_devices(dx).astype(like.dtype),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def embedded(
    table: Float[Array, "V E"], tokens: Int[Array, "B S"], dtype: jnp.dtype
) -> Float[Array, "B S E"]:
    """The words' vectors.

    Every device looks up its features of all words and sends each word's to the device that has
    the word: the table itself stays where it is, and so does its gradient.
    """

    def local(table, tokens):
        words = lax.all_gather(tokens.ravel(), AXES, tiled=True)
        part = jnp.take(table, words, axis=0).astype(dtype)
        vectors = lax.all_to_all(part, AXES, split_axis=0, concat_axis=1, tiled=True)
        return vectors.reshape(*tokens.shape, -1)

    return jax.shard_map(local, in_specs=(P(None, AXES), TOKENS), out_specs=TOKENS)(table, tokens)
