"""The differentiable attention of one token a row, as it is decoded, to the keys of a cache.

Keys have heads first, as caches have them. The kernel, `_triton.decode`, reads the keys once, which
is what such a step costs. The backward pass, which hardly anybody needs, takes products with all
keys, here.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels import _device, _support
from pallas_kernels._logits import LOG2_E, cap_logits
from pallas_kernels._spec import SlotBounds, Slots, Spec, accumulator_dtype


def has_one_query_kernel(
    query: Float[Array, "B T N H"], value: Float[Array, "B T K Hv"], num_slots: int
) -> bool:
    """Whether `attend_one_query` can compute this, with so many slots, on the device compiled for.

    Its kernel counts elements in 32 bits.
    """
    batch, _, num_kv_heads, value_dim = value.shape
    if batch * num_kv_heads * num_slots * max(query.shape[-1], value_dim) >= 2**31:
        return False
    try:
        _support.check_triton("triton")
        _support.check_head_dims("triton", query, value)
        _support.check_dtype("triton", query, ("bfloat16", "float16"))
    except NotImplementedError:
        return False
    return True


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_one_query(
    spec: Spec,
    query: Float[Array, "B K G H"],
    runs: tuple[Slots, ...],
    bounds: SlotBounds,
    sink_logits: Float[Array, "N"] | None,
) -> Float[Array, "B K G Hv"]:
    """Attention of one token a row to the slots of a rolling buffer, and to sinks.

    Args:
        spec: scale and cap.
        query: of the token, by heads of keys.
        runs: the rolling buffer, then the sinks if there are any.
        bounds: which slots each row's token sees.
        sink_logits: learned sinks.
    """
    from pallas_kernels._triton.decode import decode  # a JAX may lack what it imports

    interpret = _support.interprets("triton")
    out = decode(
        spec, query, runs, bounds, sink_logits,
        num_sms=_device.multiprocessors(), interpret=interpret,
    )  # fmt: skip
    return out.astype(query.dtype)


def _forward(
    spec: Spec,
    query: Float[Array, "B K G H"],
    runs: tuple[Slots, ...],
    bounds: SlotBounds,
    sink_logits: Float[Array, "N"] | None,
) -> tuple[Float[Array, "B K G Hv"], tuple]:
    out = attend_one_query(spec, query, runs, bounds, sink_logits)
    return out, (query, runs, bounds, sink_logits)


def _backward(spec: Spec, residuals: tuple, dout: Float[Array, "B K G Hv"]) -> tuple:
    query, runs, bounds, sink_logits = residuals

    def dense(query, runs, sink_logits):
        return _dense(spec, query, runs, bounds, sink_logits)

    dquery, druns, dsink_logits = jax.vjp(dense, query, runs, sink_logits)[1](dout)
    return dquery, druns, None, dsink_logits


attend_one_query.defvjp(_forward, _backward)


def _dense(
    spec: Spec,
    query: Float[Array, "B K G H"],
    runs: tuple[Slots, ...],
    bounds: SlotBounds,
    sink_logits: Float[Array, "N"] | None,
) -> Float[Array, "B K G Hv"]:
    """`attend_one_query` by products with all keys."""
    dtype = accumulator_dtype(query.dtype)
    key, value = (jnp.concatenate(x, axis=2) for x in zip(*runs, strict=True))
    num_slots = runs[0][0].shape[2]
    last, reach, num_sinks = (bounds[:, n, None] for n in range(3))
    before = (last - jnp.arange(num_slots, dtype=jnp.int32)) % num_slots
    sinks = jnp.arange(key.shape[2] - num_slots, dtype=jnp.int32)
    seen = jnp.concatenate((before <= reach, sinks < num_sinks), axis=1)[:, None, None]
    products = jnp.einsum("bkgh,bksh->bkgs", query, key, preferred_element_type=dtype)
    logits, factor, _ = cap_logits(spec, products)
    logits = jnp.where(seen, logits * (factor / LOG2_E), -jnp.inf)
    if sink_logits is not None:
        learned = sink_logits.astype(dtype).reshape(1, *query.shape[1:3], 1)
        learned = jnp.broadcast_to(learned, (*query.shape[:3], 1))
        logits = jnp.concatenate((logits, learned), axis=-1)
    row_max = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(dtype).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(row_max))
    row_sum = weights.sum(-1, keepdims=True)
    weights = (weights / jnp.where(row_sum > 0, row_sum, 1))[..., : key.shape[2]]
    weights = weights.astype(value.dtype)
    out = jnp.einsum("bkgs,bksv->bkgv", weights, value, preferred_element_type=dtype)
    return out.astype(query.dtype)
