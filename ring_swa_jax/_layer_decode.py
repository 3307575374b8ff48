"""Decoding of a layer, from its projections to the attended values, for both Flax modules."""

import dataclasses
import functools
import math

import einops
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from ring_swa_jax import _cache, _cache_new
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._cache import Cache
from ring_swa_jax._decode import decode_attention
from ring_swa_jax._integers import as_positions, as_segment_ids
from ring_swa_jax._layer import AttentionLayer, KeysValues, Learned, Projected, SharedKeysValues
from ring_swa_jax._mesh_axes import sequence_devices
from ring_swa_jax._segments import segment_positions

_CHUNK = 128  # tokens of a long prompt with cache-relative positions that are attended at once


def init_cache(
    layer: AttentionLayer,
    batch_size: int,
    *,
    max_length: int | None,
    max_trim: int,
    dtype,
    relative_positions: bool,
) -> Cache:
    """An empty cache of the layer."""
    return _cache_new.init_cache(
        batch_size,
        layer.num_kv_heads,
        layer.head_dim,
        window_size=layer.cached_window,
        num_sink_tokens=layer.num_sink_tokens,
        max_length=max_length,
        max_trim=max_trim,
        value_dim=layer.value_dim,
        dtype=dtype,
        relative_positions=relative_positions,
    )


def prefill(
    layer: AttentionLayer,
    projected: Projected,
    learned: Learned,
    *,
    segment_ids: Int[AnyArray, "B S"] | None,
    positions: Int[AnyArray, "B S"] | None,
    max_length: int | None,
    max_trim: int,
    relative_positions: bool,
) -> tuple[Float[Array, "B S N Hv"], Cache]:
    """The attended values of whole rows, and the cache that goes on with their last sequences."""
    _check_own_kv(layer)
    _check_positions(layer, positions, relative_positions)
    _check_order(layer, projected.query)
    if segment_ids is not None:
        segment_ids = as_segment_ids(segment_ids, projected.query.shape[:2])
    positions = layer.positions(projected.query, segment_ids, positions)
    q = layer.queries(projected.query, learned, positions)
    kv = cached = layer.keys_values(projected, learned, positions)
    if relative_positions:
        cached = layer.keys_values(projected, learned, None)
    cache = _cache_new.prefill_cache(
        *cached,
        window_size=layer.cached_window,
        num_sink_tokens=layer.num_sink_tokens,
        segment_ids=segment_ids,
        max_length=max_length,
        max_trim=max_trim,
        relative_positions=relative_positions,
    )
    if relative_positions and q.shape[1] > _same_positions(layer):
        _check_not_cut(layer, q)
        q = layer.queries(projected.query, learned, None)
        context = _attend_chunks(layer, q, *cached, segment_ids, learned.sink_logits)
    else:
        context = layer.attend(q, *kv, segment_ids, learned.sink_logits)
    return layer.gated(context, projected.gate), cache


def decode(
    layer: AttentionLayer,
    projected: Projected,
    learned: Learned,
    cache: Cache,
    *,
    valid: Bool[AnyArray, "B T"] | None,
    positions: Int[AnyArray, "B T"] | None,
    shared_kv: SharedKeysValues | None,
) -> tuple[Float[Array, "B T N Hv"], Cache]:
    """The attended values of the next tokens of each row, and the cache with these.

    A layer that shares another one's keys and values leaves the cache as that one found it.
    """
    _cache.check_cache(cache)
    _check_positions(layer, positions, cache.relative_positions)
    positions = _positions_after(cache, projected.query.shape[1], valid, positions)
    q = layer.queries(projected.query, learned, positions)
    kv = layer.keys_values(projected, learned, positions, shared_kv)
    context, after = _attend_step(layer, q, *kv, cache, valid, learned.sink_logits)
    return layer.gated(context, projected.gate), cache if layer.kv_shared else after


def keys_values(
    layer: AttentionLayer,
    projected: Projected,
    learned: Learned,
    *,
    segment_ids: Int[AnyArray, "B S"] | None,
    positions: Int[AnyArray, "B S"] | None,
    cache: Cache | None,
    valid: Bool[AnyArray, "B S"] | None,
) -> KeysValues:
    """Keys and values as the layer's queries meet them, of whole rows or of the next tokens."""
    if segment_ids is not None:
        segment_ids = as_segment_ids(segment_ids, projected.query.shape[:2])
    if cache is None:
        positions = layer.positions(projected.query, segment_ids, positions)
    else:
        _cache.check_cache(cache)
        positions = _positions_after(cache, projected.query.shape[1], valid, positions)
    return layer.keys_values(projected, learned, positions)


def _positions_after(
    cache: Cache,
    num_tokens: int,
    valid: Bool[AnyArray, "B T"] | None,
    positions: Int[AnyArray, "B T"] | None,
) -> Int[Array, "B T"] | None:
    """Positions to rotate the next tokens by; None where the cache holds unrotated keys."""
    if cache.relative_positions:
        return None
    if positions is None:
        return _cache.next_positions(cache, num_tokens, valid)
    return as_positions(positions)


def _attend_step(
    layer: AttentionLayer,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    cache: Cache,
    valid: Bool[AnyArray, "B T"] | None,
    sink_logits: Float[Array, "N"] | None,
) -> tuple[Float[Array, "B T N Hv"], Cache]:
    return decode_attention(
        q,
        k,
        v,
        cache,
        window_size=layer.cached_window,
        num_sink_tokens=layer.num_sink_tokens,
        valid=valid,
        scale=layer.scale,
        logits_soft_cap=layer.logits_soft_cap,
        sink_logits=sink_logits,
        attention_chunk_size=layer.attention_chunk_size,
        rotate=layer.rotate if cache.relative_positions else None,
        implementation=layer.implementation,
    )


# The jit is for calls outside of any other, which would compile the loop anew each time.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _attend_chunks(layer, q, k, v, segment_ids, sink_logits) -> Float[Array, "B S N Hv"]:
    """Attention of whole rows with cache-relative positions."""
    batch, length = q.shape[:2]
    cache = init_cache(
        layer, batch, max_length=None, max_trim=1, dtype=k.dtype, relative_positions=True
    )
    cache = _cache.lie_as(k, cache)
    if segment_ids is None:
        chunk = _CHUNK
        valid = jnp.ones((batch, length), bool)
        begins = jnp.zeros((batch, length), bool)  # the cache begins empty
    else:
        segment_ids = jnp.asarray(segment_ids)
        chunk = 1  # all tokens of a row's chunk must be of one sequence
        valid = segment_ids >= 0
        begins = segment_positions(segment_ids) == 0

    def cut(x):
        padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2)
        return einops.rearrange(jnp.pad(x, padding), "b (n t) ... -> n b t ...", t=chunk)

    def step(cache, tokens):
        q, k, v, valid, begins = tokens
        count = jnp.where(begins[:, 0], 0, cache.length)
        cache = dataclasses.replace(cache, length=count)
        out, cache = _attend_step(layer, q, k, v, cache, valid, sink_logits)
        return cache, out

    _, out = lax.scan(step, cache, tuple(map(cut, (q, k, v, valid, begins))))
    return einops.rearrange(out, "n b t ... -> b (n t) ...")[:, :length]


def _same_positions(layer: AttentionLayer) -> float:
    """The longest prompt for which relative and absolute positions give equal results."""
    window = layer.cached_window
    if layer.rope is None or window is None or layer.num_sink_tokens == 0:
        return math.inf
    return layer.num_sink_tokens + window + 1


def _check_own_kv(layer: AttentionLayer) -> None:
    if layer.kv_shared:
        raise ValueError(
            "a layer with kv_shared=True has no cache to fill: beside the earlier layer's prefill "
            "call it with shared_kv=..., that layer's keys_values(x, ...)"
        )


def _check_positions(
    layer: AttentionLayer, positions: Int[AnyArray, "B S"] | None, relative_positions: bool
) -> None:
    if not relative_positions:
        return
    if positions is not None:
        raise ValueError(
            f"relative_positions=True counts positions in the cache, so positions "
            f"{jnp.shape(positions)} cannot be honoured; pass positions=None"
        )
    for name in ("query_scaling", "qk_norm_after_rope"):
        if getattr(layer, name):
            raise ValueError(
                f"relative_positions=True rotates what the cache holds anew at each step, which "
                f"{name}={getattr(layer, name)!r} does not allow; use relative_positions=False"
            )


def _check_order(layer: AttentionLayer, q) -> None:
    devices = layer.dual_chunk_devices(q)
    if devices > 1:
        raise ValueError(
            f"the cache keeps the last tokens, but layout='dual_chunk' holds them in the order of "
            f"half chunks over {devices} devices; prefill with layout='contiguous'"
        )


def _check_not_cut(layer: AttentionLayer, q) -> None:
    axes = (layer.seq_axis, layer.batch_axis, layer.head_axis)
    devices = sequence_devices(q, layer.mesh, *axes)
    if devices > 1:
        raise ValueError(
            f"with relative_positions=True a prompt of {q.shape[1]} tokens, more than "
            f"num_sink_tokens + window_size + 1 = {_same_positions(layer)}, "
            f"is attended in the order of its tokens, but seq_axis={layer.seq_axis!r} cuts it over "
            f"{devices} devices; prefill on a mesh where that axis has one device, or without "
            "relative_positions"
        )
