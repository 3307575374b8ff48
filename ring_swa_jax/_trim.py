"""Taking tokens back from a cache, as speculative decoding does with drafts that are rejected.

A token that is taken back leaves a slot whose key had been overwritten. The slot then counts as
that of the token C before, and a cache of C = ``window_size + max_trim`` slots sees none of those:
of ``max_trim`` such slots the nearest stands ``window_size + 1`` tokens before the next token.
`Cache.trimmed` counts the slots until new tokens have taken them.
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
        cache: after these tokens.
        num_tokens: how many tokens a row gives back, one number for all rows or one each. Where
            keys leave the window, the tokens that are given back without new ones decoded in their
            place must not be more than ``max_trim`` of `init_cache`.

    Returns:
        The cache. A row that gives back more than it may has **NaN** in all results from then on.

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
