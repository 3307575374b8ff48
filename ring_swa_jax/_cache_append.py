"""More tokens into a cache: which of them it keeps, and in which slots."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from ring_swa_jax._cache import MOST_TOKENS, Cache, next_positions

_FOLD_AT = 2**30
"""Tokens from which on `Cache.length` is reduced where only its remainder matters."""


def append_sinks(
    cache: Cache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    valid: Bool[Array, "B T"],
) -> Cache:
    """Stores only those of T more tokens that are sinks.

    Call `append_window` next, which stores the rest and counts all T.
    """
    sinks = cache.sink_key.shape[2]
    positions = next_positions(cache, k.shape[1], valid)
    slots = _slots_or_none(valid & (positions < sinks), positions, sinks)
    # One token is chosen for a slot or not, which XLA computes for keys and values at once.
    store = _select if k.shape[1] == 1 else _scatter
    return dataclasses.replace(
        cache,
        sink_key=store(cache.sink_key, slots, k),
        sink_value=store(cache.sink_value, slots, v),
    )


def append_window(
    cache: Cache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    valid: Bool[Array, "B T"],
) -> Cache:
    """The cache with the last of T more tokens in its rolling buffer, and all of them counted."""
    num_slots, sinks = cache.num_slots, cache.sink_key.shape[2]
    positions = next_positions(cache, k.shape[1], valid)
    count = valid.sum(1, dtype=jnp.int32)
    if cache.max_length is None:
        kept = valid & (positions >= (cache.length + count - num_slots)[:, None])
    else:
        kept = valid & (positions < num_slots)
    slots = _slots_or_none(kept, positions % num_slots, num_slots)
    length = cache.length + jnp.minimum(count, MOST_TOKENS - cache.length)
    if cache.relative_positions and cache.max_length is None:
        # Past the sinks and one round of the buffer only the slot of the next token matters.
        settled = -(-(sinks + num_slots) // num_slots) * num_slots
        count_on = (length < _FOLD_AT) | (length == MOST_TOKENS)
        length = jnp.where(count_on, length, settled + length % num_slots)
    return dataclasses.replace(
        cache,
        key=_scatter(cache.key, slots, k),
        value=_scatter(cache.value, slots, v),
        length=length,
        trimmed=jnp.maximum(cache.trimmed - count, 0),
    )


def fits_into_cache(cache: Cache, num_tokens: int, valid: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which new tokens still fit into ``max_length`` and into the int32 of ``length``."""
    limit = MOST_TOKENS if cache.max_length is None else cache.max_length
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    return rank < (limit - cache.length)[:, None]


def _slots_or_none(
    kept: Bool[Array, "B T"], slots: Int[Array, "B T"], num_slots: int
) -> Int[Array, "B T"]:
    """The slot of each token that is kept.

    Tokens that are not kept get distinct indices past the buffer, which the scatter drops.
    """
    none = num_slots + jnp.arange(slots.shape[1], dtype=jnp.int32)[None]
    return jnp.where(kept, slots, none)


def _select(
    buffer: Float[Array, "B K P H"], slots: Int[Array, "B 1"], token: Float[Array, "B 1 K H"]
) -> Float[Array, "B K P H"]:
    """The buffer with one token of each row in its slot."""
    is_slot = jnp.arange(buffer.shape[2], dtype=jnp.int32)[None] == slots
    return jnp.where(is_slot[:, None, :, None], jnp.swapaxes(token, 1, 2), buffer)


def _scatter(
    buffer: Float[Array, "B K C H"], slots: Int[Array, "B T"], tokens: Float[Array, "B T K H"]
) -> Float[Array, "B K C H"]:
    if buffer.shape[2] == 0:
        return buffer

    def put(buffer, slots, tokens):
        return buffer.at[:, slots].set(tokens, mode="drop", unique_indices=True)

    return jax.vmap(put)(buffer, slots, jnp.swapaxes(tokens, 1, 2))
