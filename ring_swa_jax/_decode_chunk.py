"""Attention of new tokens to a cache and each other by kernels.

Many new tokens are as a shard whose earlier keys are at hand: those of the cache, in their order.
The kernels are those of whole rows. One token has a kernel that reads the cache as it lies.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

import pallas_kernels
from ring_swa_jax._attend_chunk import matmul_precision
from ring_swa_jax._cache import Cache

FEWEST_TOKENS = 64
"""New tokens from which on kernels are used: a tile of queries. Fewer leave most of it empty."""


def kernels_for(
    implementation: str | None,
    spec: pallas_kernels.Spec,
    q: Float[Array, "B T N H"],
    v: Float[Array, "B T K Hv"],
    num_slots: int,
) -> str | None:
    """The implementation whose kernels compute this; None: matrix products of all keys do.

    Those need no kernels of "xla", and XLA cuts them over the axes of a mesh that are not manual.
    """
    chosen = pallas_kernels.choose(implementation, spec, q, v)
    mesh = jax.sharding.get_abstract_mesh()
    devices = [mesh.shape[name] for name in mesh.axis_names if name not in mesh.manual_axes]
    if chosen == "xla" or any(size > 1 for size in devices) or q.shape[0] == 0:
        return None
    if q.shape[1] == 1:
        return chosen if pallas_kernels.has_one_query_kernel(q, v, num_slots) else None
    return chosen if q.shape[1] >= FEWEST_TOKENS else None


def attend_one_token(
    spec: pallas_kernels.Spec,
    q: Float[Array, "B 1 N H"],
    cache: Cache,
    sink_logits: Float[Array, "N"] | None,
    valid: Bool[Array, "B 1"],
    chunk: int | None,
) -> Float[Array, "B 1 N Hv"]:
    """The attended values of one new token a row; ``cache`` has it already."""
    position = cache.length - 1
    reach = position if spec.window is None else jnp.minimum(position, spec.window)
    if chunk is not None:
        reach = jnp.minimum(reach, position % chunk)
    runs = [(cache.key, cache.value)]
    sinks = jnp.zeros_like(position)
    if spec.num_sinks:
        assert spec.window is not None
        runs.append((cache.sink_key, cache.sink_value))
        sinks = jnp.clip(position - spec.window, 0, spec.num_sinks)
    is_token = valid[:, 0]
    bounds = jnp.stack(
        (
            position % cache.num_slots,
            jnp.where(is_token, reach, -1),
            jnp.where(is_token, sinks, 0),
            jnp.zeros_like(position),
        ),
        axis=1,
    )
    query = q.reshape(q.shape[0], cache.key.shape[1], -1, q.shape[3])
    out = pallas_kernels.attend_one_query(spec, query, tuple(runs), bounds, sink_logits)
    return out.reshape(q.shape[0], 1, q.shape[2], -1)


def attend_by_kernels(
    implementation: str,
    spec: pallas_kernels.Spec,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    cache: Cache,
    sink_logits: Float[Array, "N"] | None,
    valid: Bool[Array, "B T"] | None,
    chunk: int | None,
) -> Float[Array, "B T N Hv"]:
    """The attended values of new tokens; ``cache`` is as it was before them.

    Args:
        implementation: as `kernels_for` returns it.
        spec: static settings.
        q: queries of the new tokens.
        k: keys.
        v: values.
        cache: keys and values of the tokens before.
        sink_logits: learned sinks.
        valid: False for padding, whose keys and values are zeros; None: there is none.
        chunk: queries see no key before the last multiple of this position; None: all.
    """
    order = None
    if valid is not None:
        # A token's index is its position, so padding goes to the end.
        order = jnp.argsort(~valid, axis=1, stable=True)
        q, k, v = (jnp.take_along_axis(x, order[..., None, None], axis=1) for x in (q, k, v))
    sinks = None
    if spec.num_sinks:
        dtype = pallas_kernels.accumulator_dtype(q.dtype)
        before = (cache.sink_key, cache.sink_value)
        sinks = pallas_kernels.SinkRun(*(x.swapaxes(1, 2).astype(dtype) for x in before))
    out = pallas_kernels.attend_after_keys(
        spec,
        implementation,
        (_in_order(cache.key, cache.length), _in_order(cache.value, cache.length)),
        q,
        k,
        v,
        sinks,
        sink_logits,
        _starts(cache.length, q.shape[1], valid, chunk),
    )
    if order is not None:
        back = jnp.argsort(order, axis=1)
        out = jnp.take_along_axis(out, back[..., None, None], axis=1)
    return out


def spec_for(
    window: int | None, num_sinks: int, scale: float, cap: float | None
) -> pallas_kernels.Spec:
    """Settings of a launch. Without a window the sinks are among the keys that are seen anyway."""
    num_sinks = 0 if window is None else num_sinks
    return pallas_kernels.Spec(window, num_sinks, scale, cap, matmul_precision())


def _in_order(buffer: Float[Array, "B K C H"], length: Int[Array, "B"]) -> Float[Array, "B C K H"]:
    """The rolling buffer of each row in the order of positions, so that the last token is last."""
    slots = buffer.shape[2]
    index = (length[:, None] + jnp.arange(slots, dtype=jnp.int32)) % slots
    return jax.vmap(lambda row, at: row.swapaxes(0, 1)[at])(buffer, index)


def _starts(
    length: Int[Array, "B"], num_tokens: int, valid: Bool[Array, "B T"] | None, chunk: int | None
) -> Int[Array, "B T"]:
    """Where each new token's first key is, relative to the first new token of its row.

    One number for all would say that no earlier key at hand is before it; a cache has such slots.
    """
    index = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    start = jnp.broadcast_to(-length[:, None], (length.shape[0], num_tokens))
    if chunk is not None:
        position = length[:, None] + index
        start = position - position % chunk - length[:, None]
    if valid is not None:
        start = jnp.where(index < valid.sum(1, dtype=jnp.int32)[:, None], start, index + 1)
    return start
