"""Removes the last tokens from a cache, such as the rejected drafts of speculative decoding.

A removed token has overwritten the key C positions before it, and its own key stays in the slot.
`slot_positions` then gives the slot the position of the overwritten key, which must therefore be
outside the window. A cache of C = ``window_size + max_trim`` slots ensures this: after ``max_trim``
removed tokens the nearest such position is ``window_size + 1`` before the next token.
`Cache.trimmed` counts these slots until new tokens overwrite them.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from ring_swa_jax import _checks
from ring_swa_jax._cache import MOST_TOKENS, Cache, check_cache
from ring_swa_jax._integers import as_counts


def trim_cache(cache: Cache, num_tokens: int | Int[Array, "B"]) -> Cache:
    """The cache before the last tokens of each row, such as drafts that were not accepted.

    Args:
        cache: the cache that holds these tokens.
        num_tokens: how many tokens to remove, one number for all rows or one for each row. Where
            keys leave the window, at most ``max_trim`` (of `init_cache`) removed tokens may be
            without new tokens decoded in their place.

    Returns:
        The cache. A row from which too many tokens were removed has **NaN** in all later results.

    Raises:
        ValueError: a negative number, a Python integer larger than the cache allows, or another
            shape.
        TypeError: no integers, or no cache.
    """
    check_cache(cache)
    if isinstance(num_tokens, int):
        most = cache.max_trim
        if _checks.static_count("num_tokens", num_tokens) > most:
            raise ValueError(
                f"num_tokens={num_tokens} are more than this cache gives back, which is {most}; "
                f"make it with max_trim={num_tokens}"
            )
    count = as_counts("num_tokens", num_tokens)
    if count.shape not in ((), cache.length.shape):
        raise ValueError(
            f"num_tokens must be one number or have the shape {cache.length.shape}, "
            f"got {count.shape}"
        )
    allowed = (count >= 0) & (count <= cache.length) & (cache.length < MOST_TOKENS)
    trimmed = cache.trimmed
    if cache.max_length is None:
        allowed &= count <= cache.max_trim - trimmed
        trimmed = trimmed + count
    return dataclasses.replace(
        cache,
        length=jnp.where(allowed, cache.length - count, MOST_TOKENS),
        trimmed=jnp.where(allowed, trimmed, 0),
    )
