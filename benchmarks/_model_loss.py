"""The cross entropy of a large vocabulary, whose logits never exist all at once."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from benchmarks._model_sharding import cut_over_devices, tokens_cut, whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mean_cross_entropy(
    x: Float[Array, "B S E"],
    table: Float[Array, "V E"],
    targets: Int[Array, "B S"],
    chunk: int,
) -> Float[Array, ""]:
    r"""Mean of :math:`\log \sum_v \exp(x \cdot w_v) - x \cdot w_{target}` over all tokens.

    Args:
        x: features, in the dtype of the products.
        table: the words' vectors w, its features cut over all devices.
        targets: the word that each token is to predict.
        chunk: for so many words at a time there are logits; it divides V.
    """
    return _forward(x, table, targets, chunk)[0]


def _chunks(table: Array, chunk: int) -> tuple[Array, Array]:
    """The number of each chunk's first word, and the chunk's vectors."""
    words, features = table.shape
    return jnp.arange(0, words, chunk), table.reshape(words // chunk, chunk, features)


def _logits(x: Array, vectors: Array) -> tuple[Array, Array]:
    """Float32 logits of a chunk's words, and the vectors as they multiply x."""
    vectors = whole(vectors.astype(x.dtype))
    return jnp.einsum("bse,ve->bsv", x, vectors, preferred_element_type=jnp.float32), vectors


def _forward(x, table, targets, chunk):
    def step(carry, inputs):
        lse, picked = carry
        first, vectors = inputs
        logits, _ = _logits(x, vectors)
        lse = jnp.logaddexp(lse, jax.nn.logsumexp(logits, axis=-1))
        place = targets - first
        found = jnp.take_along_axis(logits, jnp.clip(place, 0, chunk - 1)[..., None], axis=-1)
        here = (place >= 0) & (place < chunk)
        return (tokens_cut(lse), jnp.where(here, found[..., 0], picked)), None

    start = jnp.full(targets.shape, -jnp.inf), jnp.zeros(targets.shape)
    (lse, picked), _ = lax.scan(step, tuple(map(tokens_cut, start)), _chunks(table, chunk))
    return jnp.mean(lse - picked), (x, table, targets, lse)


def _backward(chunk, residuals, dloss):
    x, table, targets, lse = residuals
    weight = dloss / targets.size

    def step(dx, inputs):
        first, vectors = inputs
        logits, vectors = _logits(x, vectors)
        hit = (targets - first)[..., None] == jnp.arange(chunk)
        dlogits = ((jnp.exp(logits - lse[..., None]) - hit) * weight).astype(x.dtype)
        dvectors = jnp.einsum("bsv,bse->ve", dlogits, x)
        product = jnp.einsum("bsv,ve->bse", dlogits, vectors, preferred_element_type=jnp.float32)
        return tokens_cut(dx + product), cut_over_devices(dvectors, axis=1).astype(table.dtype)

    start = tokens_cut(jnp.zeros(x.shape, jnp.float32))
    dx, dtable = lax.scan(step, start, _chunks(table, chunk))
    return dx.astype(x.dtype), dtable.reshape(table.shape), None


mean_cross_entropy.defvjp(_forward, _backward)
