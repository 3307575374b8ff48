"""Decoding of a layer, from its projections to the attended values, for both Flax modules."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from ring_swa_jax import _cache
from ring_swa_jax._cache import Cache
from ring_swa_jax._decode import decode_attention
from ring_swa_jax._integers import as_positions, as_segment_ids
from ring_swa_jax._layer import AttentionLayer, Learned
from ring_swa_jax._segments import segment_positions
from ring_swa_jax._sharded import sequence_devices

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
    return _cache.init_cache(
        batch_size,
        layer.num_kv_heads,
        layer.head_dim,
        window_size=layer.window_size,
        num_sink_tokens=layer.num_sink_tokens,
        max_length=max_length,
        max_trim=max_trim,
        value_dim=layer.value_dim,
        dtype=dtype,
        relative_positions=relative_positions,
    )


def prefill(
    layer: AttentionLayer,
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    learned: Learned,
    *,
    segment_ids: Int[Array, "B S"] | None,
    positions: Int[Array, "B S"] | None,
    max_length: int | None,
    max_trim: int,
    relative_positions: bool,
) -> tuple[Float[Array, "B S N Hv"], Cache]:
    """The attended values of whole rows, and the cache that goes on with their last sequences."""
    _check_positions(positions, relative_positions)
    if segment_ids is not None:
        segment_ids = as_segment_ids(segment_ids, q.shape[:2])
    q, k = layer.normalise(q, k, learned)
    positions = layer.positions(q, segment_ids, positions)
    turned_q, turned_k = layer.rotate(q, positions), layer.rotate(k, positions)
    cache = _cache.prefill_cache(
        k if relative_positions else turned_k,
        v,
        window_size=layer.window_size,
        num_sink_tokens=layer.num_sink_tokens,
        segment_ids=segment_ids,
        max_length=max_length,
        max_trim=max_trim,
        relative_positions=relative_positions,
    )
    if relative_positions and q.shape[1] > _same_positions(layer):
        _check_not_cut(layer, q)
        context = _attend_chunks(layer, q, k, v, segment_ids, learned.sink_logits)
    else:
        context = layer.attend(turned_q, turned_k, v, segment_ids, learned.sink_logits)
    return context, cache


def decode(
    layer: AttentionLayer,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    learned: Learned,
    cache: Cache,
    *,
    valid: Bool[Array, "B T"] | None,
    positions: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T N Hv"], Cache]:
    """The attended values of the next tokens of each row, and the cache with these."""
    _cache.check_cache(cache)
    _check_positions(positions, cache.relative_positions)
    q, k = layer.normalise(q, k, learned)
    if not cache.relative_positions:
        if positions is None:
            positions = _cache.next_positions(cache, q.shape[1], valid)
        else:
            positions = as_positions(positions)
        q, k = layer.rotate(q, positions), layer.rotate(k, positions)
    return _attend_step(layer, q, k, v, cache, valid, learned.sink_logits)


def _attend_step(layer, q, k, v, cache, valid, sink_logits):
    return decode_attention(
        q,
        k,
        v,
        cache,
        window_size=layer.window_size,
        num_sink_tokens=layer.num_sink_tokens,
        valid=valid,
        scale=layer.scale,
        logits_soft_cap=layer.logits_soft_cap,
        sink_logits=sink_logits,
        rotate=layer.rotate if cache.relative_positions else None,
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
        chunk = 1  # all tokens of a row's chunk must be of one sequence
        valid = segment_ids >= 0
        begins = segment_positions(segment_ids) == 0

    def cut(x):
        padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    def step(cache, tokens):
        q, k, v, valid, begins = tokens
        count = jnp.where(begins[:, 0], 0, cache.length)
        cache = dataclasses.replace(cache, length=count)
        out, cache = _attend_step(layer, q, k, v, cache, valid, sink_logits)
        return cache, out

    _, out = lax.scan(step, cache, tuple(map(cut, (q, k, v, valid, begins))))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(batch, -1, *out.shape[3:])[:, :length]


def _same_positions(layer: AttentionLayer) -> float:
    """The longest prompt with equal results of cache-relative positions and of absolute ones."""
    if layer.rope is None or layer.window_size is None or layer.num_sink_tokens == 0:
        return math.inf
    return layer.num_sink_tokens + layer.window_size + 1


def _check_positions(positions, relative_positions: bool) -> None:
    if relative_positions and positions is not None:
        raise ValueError(
            f"relative_positions=True counts positions in the cache, so positions "
            f"{jnp.shape(positions)} cannot be honoured; pass positions=None"
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
