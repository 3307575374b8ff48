"""Attention of new tokens to a cache and to each other."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from ring_swa_jax import _checks, _decode_chunk
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._cache import (
    Cache,
    check_cache,
    effective_window,
    next_positions,
    slot_positions,
)
from ring_swa_jax._cache_append import append_sinks, append_window, fits_into_cache
from ring_swa_jax._decode_keys import NewTokens, Rotate, attend_runs
from ring_swa_jax._window import WindowSize, static_causal_window


def decode_attention(
    q: Float[AnyArray, "B T N H"],
    k: Float[AnyArray, "B T K H"],
    v: Float[AnyArray, "B T K Hv"],
    cache: Cache,
    *,
    window_size: WindowSize,
    num_sink_tokens: int = 0,
    valid: Bool[AnyArray, "B T"] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    attention_chunk_size: int | None = None,
    rotate: Rotate | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N Hv"], Cache]:
    r"""Attention of T new tokens a row to the cache and each other, and the cache with them.

    The query at position i of its row attends the key at j iff ``j <= i`` and
    (``i - j <= window_size`` or ``j < num_sink_tokens``):

    .. math:: o_i = \frac{\sum_j e^{s_{ij}} v_j}{e^{z} + \sum_j e^{s_{ij}}}

    with :math:`s_{ij} = q_i \cdot k_j \cdot \mathrm{scale}`, softly capped, and :math:`e^z` only
    where there are ``sink_logits``. So token by token or in chunks, the results are those of
    `ring_attention` to rounding. A step costs O(T (C + T)) for C cached keys, however long the
    sequence has grown.

    **Positions.** By default q and k come rotated by their positions in the sequence, which are
    `next_positions`. With *cache-relative positions* (StreamingLLM) they come unrotated, the cache
    has ``relative_positions=True`` and ``rotate`` is given. The position of a key is then its index
    among the keys that the query sees, sinks first, and the query's is that of its own key, so
    that none exceeds ``num_sink_tokens + window_size`` in an endless stream: the sinks stay as
    near as if nothing had been dropped between them and the window. Window keys keep their
    distances, therefore results differ from the default mode in the logits of sinks that have left
    the window, and in nothing else.

    Args:
        q: queries of T >= 1 new tokens a row.
        k: their keys; N is a multiple of K.
        v: their values, in the dtype of q and k and of the cache.
        cache: of the tokens before, of this very layer.
        window_size: W; a query sees **W + 1 keys**: the W before it and itself. None: all. Static.
        num_sink_tokens: how many first tokens of its sequence a query always sees. Static.
        valid: False for padding, which is neither counted nor cached and gets zeros; the others
            are the row's next tokens in order. None: all are tokens.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        sink_logits: one learned logit for each query head, in the softmax's denominator alone.
        attention_chunk_size: C; a query at position i sees no key before ``i - i % C``, as in
            Llama 4 (`chunk_segment_ids`). The window must hold a chunk, C - 1. Static.
        rotate: ``rotate(x, positions)`` turns queries or keys [B, S, N or K, H] by int32 positions
            [B, S], such that products depend on the distance alone, as those of `apply_rope`. With
            T > 1 positions reach ``num_sink_tokens + window_size + T - 1``, at the same distances.
        implementation: as in `ring_attention`. On one device and without ``rotate`` kernels compute
            one new token, in half precision, and 64 or more. All else takes two matrix products
            with all keys, as "xla" does.

    Returns:
        The attended values, in the dtype of q, and the cache with the new tokens. Where the
        cache has a ``max_length``, tokens past it get **NaN** and are not cached; other rows are
        not affected.

    Raises:
        ValueError: shapes, head counts or settings that do not fit each other or the cache, or
            more new tokens than ``max_length``.
        TypeError: dtypes that differ or are not floating-point, settings that are not static.
        NotImplementedError: the named implementation cannot do this.

    References:
        Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453.
    """
    q, k, v = (_checks.as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    _checks.check_heads(q, k, v)
    window = static_causal_window(window_size, "decoding")
    num_sinks = _checks.static_sinks(num_sink_tokens)
    cap = _checks.static_soft_cap(logits_soft_cap)
    scale = _checks.static_scale(scale, q.shape[-1])
    chunk = _static_chunk(attention_chunk_size, window, num_sinks)
    if sink_logits is not None:
        sink_logits = _checks.as_array("sink_logits", sink_logits)
        _checks.check_sink_logits(sink_logits, q.shape[2])
    check_cache(cache)
    window = effective_window(window, num_sinks, cache.max_length)
    _check_fits(cache, k, v, window, num_sinks, relative=rotate is not None)
    batch, num_tokens = q.shape[:2]
    padding = valid is not None
    if valid is None:
        valid = jnp.ones((batch, num_tokens), bool)
    else:
        valid = _checks.as_array("valid", valid)
        _checks.check_valid(valid, (batch, num_tokens))
        # 0 * NaN is NaN, so padding's keys and values are set to zero.
        k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))

    positions = next_positions(cache, num_tokens, valid)
    lost = valid & ~fits_into_cache(cache, num_tokens, valid)
    spec = _decode_chunk.spec_for(window, num_sinks, scale, cap)
    kernels = _decode_chunk.kernels_for(implementation, spec, q, v, cache.num_slots)
    if kernels is not None and rotate is None and num_tokens == 1:
        # The token overwrites the slot that just left its window, so it is stored first.
        cache = append_window(append_sinks(cache, k, v, valid), k, v, valid)
        out = _decode_chunk.attend_one_token(spec, q, cache, sink_logits, valid, chunk)
    elif kernels is not None and rotate is None:
        out = _decode_chunk.attend_by_kernels(
            kernels, spec, q, k, v, cache, sink_logits, valid if padding else None, chunk
        )
        cache = _append_after(out, append_sinks(cache, k, v, valid), k, v, valid)
    else:
        tokens = NewTokens.create(q, positions, valid, cache, window, num_sinks, chunk, rotate)
        out, cache = _attend_all_keys(tokens, k, v, cache, sink_logits, scale, cap)
    return jnp.where(lost[..., None, None], jnp.nan, out), cache


def _attend_all_keys(
    tokens: NewTokens,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    cache: Cache,
    sink_logits: Float[Array, "N"] | None,
    scale: float,
    cap: float | None,
) -> tuple[Float[Array, "B T N Hv"], Cache]:
    """The attended values by products with all keys, and the cache with the new tokens."""
    valid, runs, stored = tokens.valid, [], cache.length
    cache = append_sinks(cache, k, v, valid)
    if tokens.window is not None and cache.sink_key.shape[2]:
        runs.append(tokens.before_window(cache.sink_key, cache.sink_value, tokens.window))
    one_token = k.shape[1] == 1
    if one_token:
        # One token overwrites the slot that just left its window, so it is stored first.
        cache = append_window(cache, k, v, valid)
        stored = stored + valid[:, 0].astype(jnp.int32)
    else:
        new_positions = jnp.where(valid, tokens.positions, -1)
        runs.append(tokens.in_window(k.swapaxes(1, 2), v.swapaxes(1, 2), new_positions))
    cached_positions = slot_positions(stored, cache.num_slots)
    runs.append(tokens.in_window(cache.key, cache.value, cached_positions))
    out = attend_runs(runs, sink_logits, scale, cap).astype(tokens.query.dtype)
    return out, cache if one_token else _append_after(out, cache, k, v, valid)


def _append_after(
    out: Float[Array, "B T N Hv"],
    cache: Cache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    valid: Bool[Array, "B T"],
) -> Cache:
    """The cache with the new tokens in its window, whose keys ``out`` has read."""
    # The barrier orders the read before the write, so XLA writes in place.
    cache, _ = lax.optimization_barrier((cache, out))
    return append_window(cache, k, v, valid)


def _static_chunk(chunk_size: int | None, window: int | None, num_sinks: int) -> int | None:
    if chunk_size is None:
        return None
    chunk = _checks.static_size("attention_chunk_size", chunk_size)
    if num_sinks or (window is not None and window < chunk - 1):
        raise ValueError(
            f"attention_chunk_size={chunk} goes with window_size={chunk - 1} and without sink "
            f"tokens, got window_size={window} and num_sink_tokens={num_sinks}"
        )
    return chunk


def _check_fits(
    cache: Cache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    window: int | None,
    num_sinks: int,
    *,
    relative: bool,
) -> None:
    """Checks that the cache is one of this layer and of keys like these."""
    for name, new, old in (("k", k, cache.key), ("v", v, cache.value)):
        if (new.shape[0], *new.shape[2:]) != (*old.shape[:2], old.shape[3]):
            raise ValueError(
                f"{name} {new.shape}, [B, T, K, H], and the cache's {old.shape}, [B, K, C, H], "
                "must have the same batch, heads and head dim"
            )
        if new.dtype != old.dtype:
            raise TypeError(
                f"{name} is {new.dtype}, but the cache holds {old.dtype}; make the cache with "
                f"dtype={new.dtype} or cast q, k and v"
            )
    if window != cache.window_size:
        raise ValueError(f"window_size={window}, but the cache was made for {cache.window_size}")
    held = cache.sink_key.shape[2]
    if cache.max_length is None and num_sinks != held:
        raise ValueError(f"num_sink_tokens={num_sinks}, but the cache was made for {held}")
    if cache.max_length is not None and k.shape[1] > cache.max_length:
        raise ValueError(
            f"{k.shape[1]} new tokens do not fit into the cache's max_length={cache.max_length}"
        )
    if relative and not cache.relative_positions:
        raise ValueError(
            "rotate was given, but the cache holds rotated keys; make it with "
            "relative_positions=True, or rotate q and k by next_positions(cache, T) beforehand"
        )
    if cache.relative_positions and not relative:
        raise ValueError(
            "the cache has relative_positions=True, so pass unrotated q and k, and rotate=..."
        )
