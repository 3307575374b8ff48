"""The definition: dense attention with the mask written out."""

import einops
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import accumulator_dtype
from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._integers import as_segment_ids
from ring_swa_jax._segments import bounds_of
from ring_swa_jax._window import Window, WindowSize


def reference_attention(
    q: Float[AnyArray, "B S N H"],
    k: Float[AnyArray, "B S K H"],
    v: Float[AnyArray, "B S K Hv"],
    *,
    window_size: WindowSize = None,
    num_sink_tokens: int = 0,
    segment_ids: Int[AnyArray, "B S"] | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "B S N Hv"]:
    r"""What every implementation computes, by an [S, S] matrix of logits.

    Query i attends key j of its own sequence, which starts at s, iff ``i - j <= L`` and
    ``j - i <= R`` for ``window_size=(L, R)``, or ``j <= i`` and ``j - s < num_sink_tokens``:

    .. math:: o_i = \frac{\sum_j e^{s_{ij}} v_j}{e^{z} + \sum_j e^{s_{ij}}}

    with :math:`s_{ij} = q_i \cdot k_j \cdot \mathrm{scale}`, softly capped, and :math:`e^z` only
    where there are ``sink_logits``. A query without keys (padding) gives zeros.

    Args:
        q: queries of whole rows, any floating-point dtype; float64 computes in float64, the
            others in float32.
        k: keys; N is a multiple of K.
        v: values.
        window_size: W; a query sees **W + 1 keys**: the W before it and itself. A pair (L, R): the
            L before it, itself, and the R after it. None, alone or in a pair: no bound; alone it
            is (None, 0), causal.
        num_sink_tokens: how many first tokens of its sequence every query sees.
        segment_ids: of any integer dtype; a new sequence starts where the id changes; a negative
            id is padding.
        sink_logits: one learned logit for each query head, in the softmax's denominator alone.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        scale: factor of ``q.k``, by default ``H**-0.5``.

    Returns:
        The attended values, in the dtype of q.

    Raises:
        ValueError: shapes, head counts or settings that do not fit.
        TypeError: dtypes that differ or are not floating-point.
    """
    q, k, v = (_checks.as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    _checks.check_heads(q, k, v)
    window = Window.of(window_size)
    num_sinks = _checks.static_sinks(num_sink_tokens)
    cap = _checks.static_soft_cap(logits_soft_cap)
    length, heads = q.shape[1:3]
    out_dtype = q.dtype
    dtype = accumulator_dtype(out_dtype)

    positions = jnp.arange(length, dtype=jnp.int32)
    i, j = positions[None, :, None], positions[None, None]
    start, end = jnp.zeros((1, length), jnp.int32), jnp.full((1, length), length, jnp.int32)
    if segment_ids is not None:
        ids = as_segment_ids(segment_ids, q.shape[:2])
        bounds = bounds_of(SequenceAxis(None, 1), length, None, ids, ends=True)
        assert bounds.end is not None
        start, end = bounds.start, bounds.end
    start, end = start[:, :, None], end[:, :, None]
    before, after = (length if x is None else min(x, length) for x in (window.left, window.right))
    near = (i - j <= before) & (j - i <= after)
    seen = (start <= j) & (j < end) & (near | (j <= i) & (j - start < min(num_sinks, length)))

    q, k, v = (x.astype(dtype) for x in (q, k, v))
    group = heads // k.shape[2]
    k, v = (einops.repeat(x, "b s k h -> b s (k group) h", group=group) for x in (k, v))
    precision = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bihd,bjhd->bhij", q, k, precision=precision)
    logits = logits * _checks.static_scale(scale, q.shape[-1])
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    seen = seen[:, None]
    logits = jnp.where(seen, logits, -jnp.inf)
    if sink_logits is not None:
        sink_logits = _checks.as_array("sink_logits", sink_logits)
        _checks.check_sink_logits(sink_logits, heads)
        learned = jnp.broadcast_to(sink_logits[None, :, None, None], (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, learned.astype(dtype)], axis=-1)
    has_key = seen.any(-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(has_key, logits, 0), axis=-1)[..., :length]
    weights = jnp.where(seen, weights, 0)
    return jnp.einsum("bhij,bjhd->bihd", weights, v, precision=precision).astype(out_dtype)
