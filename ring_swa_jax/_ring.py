"""Attention on one chunk of a sequence, called inside the user's own ``jax.shard_map``."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

import pallas_kernels
from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import AxisName, SequenceAxis, same_varying
from ring_swa_jax._halo import RingHalo, fetch_sinks
from ring_swa_jax._integers import as_cu_seqlens
from ring_swa_jax._segments import Bounds, from_cu_seqlens, one_sequence


def ring_sliding_window_attn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    window_size: int | None,
    axis_name: AxisName | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    r"""Sliding-window attention of one chunk of a sequence that is cut over a mesh axis.

    Query i attends key j iff ``0 <= i - j <= window_size``:

    .. math:: o_i = \frac{\sum_j e^{s_{ij}} v_j}{e^{z} + \sum_j e^{s_{ij}}},
        \quad s_{ij} = \mathrm{cap}(q_i \cdot k_j \cdot \mathrm{scale})

    with :math:`e^z` only where there are ``sink_logits``. Each device receives the
    ``min(window_size, keys before it)`` keys before its chunk, and no others.

    Args:
        q: queries of the chunk; the chunk of axis index r holds positions r*T..(r+1)*T-1.
        k: keys; N is a multiple of K.
        v: values, in the dtype of q and k.
        window_size: W; a query sees **W + 1 keys**: the W before it and itself, as
            FlashAttention's ``(W, 0)``. Hugging Face's ``sliding_window=n`` is ``n - 1`` here.
            None: all keys before it. Static.
        axis_name: mesh axis (or tuple of axes, major first) that cuts the sequence; None when
            the whole sequence is here.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        sink_logits: a learned logit a query head that enlarges the denominator.
        implementation: "xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic", or None for
            the best deterministic one here.

    Returns:
        The attended values, in the dtype of q.

    Raises:
        ValueError: shapes, head counts, axis name, window or name that do not fit.
        TypeError: dtypes that differ or are not floating-point, settings that are not static.
        NotImplementedError: the named implementation cannot do this.

    References:
        Beltagy, Peters and Cohan, Longformer, arXiv:2004.05150; Dao et al., FlashAttention,
        arXiv:2205.14135; Liu, Zaharia and Abbeel, Ring Attention, arXiv:2310.01889. Learned
        sinks as in OpenAI's gpt-oss, arXiv:2508.10925.
    """
    return ring_streaming_llm_attn(
        q,
        k,
        v,
        window_size=window_size,
        num_sink_tokens=0,
        axis_name=axis_name,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sink_logits=sink_logits,
        implementation=implementation,
    )


def ring_streaming_llm_attn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    window_size: int | None,
    num_sink_tokens: int = 1,
    axis_name: AxisName | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Sliding-window attention that also sees the first tokens of the sequence.

    Query i attends key j iff ``0 <= i - j <= window_size`` (**window_size + 1 keys**) or
    ``j <= i`` and ``j < num_sink_tokens``. A key that is both counts once. Otherwise as
    `ring_sliding_window_attn`.

    Args:
        q: queries of the chunk.
        k: keys; N is a multiple of K.
        v: values, in the dtype of q and k.
        window_size: W: the W keys before a query and itself; None: all before it. Static.
        num_sink_tokens: how many first tokens every query sees; at most T on several devices.
        axis_name: mesh axis (or tuple of axes) that cuts the sequence, or None.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        sink_logits: a learned logit a query head that enlarges the denominator.
        implementation: "xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic", or None for
            the best deterministic one here.

    Returns:
        The attended values, in the dtype of q.

    Raises:
        ValueError: as `ring_sliding_window_attn`, and sinks that do not fit into a chunk.
        TypeError: as `ring_sliding_window_attn`.
        NotImplementedError: as `ring_sliding_window_attn`.

    References:
        Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453.
    """
    q, k, v = (_checks.as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    _checks.check_heads(q, k, v)
    axis = SequenceAxis.named(axis_name)
    return attend_chunk(
        q,
        k,
        v,
        axis=axis,
        bounds=one_sequence(axis, q.shape[1]),
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sink_logits=sink_logits,
        implementation=implementation,
    )


def ring_sliding_window_attn_varlen(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K Hv"],
    *,
    window_size: int | None,
    cu_seqlens: Int[AnyArray, "n"],
    axis_name: AxisName | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N Hv"]:
    """Sliding-window attention inside each sequence of a packed row that is cut over an axis.

    Query i attends key j of its own sequence iff ``0 <= i - j <= window_size``
    (**window_size + 1 keys**). Otherwise as `ring_sliding_window_attn`, without the batch.

    Args:
        q: queries of the chunk of the packed row.
        k: keys; N is a multiple of K.
        v: values, in the dtype of q and k.
        window_size: W: the W keys before a query and itself; None: all before it. Static.
        cu_seqlens: ends of the sequences in the *global* packed row, the same on every device:
            first 0, non-decreasing. Empty sequences and repeated last entries are fine; tokens
            past the last entry are padding, with zeros as result and gradient. The values are
            never read on the host.
        axis_name: mesh axis (or tuple of axes) that cuts the packed row, or None.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        sink_logits: a learned logit a query head that enlarges the denominator.
        implementation: "xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic", or None for
            the best deterministic one here.

    Returns:
        The attended values, in the dtype of q.

    Raises:
        ValueError: as `ring_sliding_window_attn`, and ``cu_seqlens`` that are no vector.
        TypeError: as `ring_sliding_window_attn`, and ``cu_seqlens`` that are no integers.
        NotImplementedError: as `ring_sliding_window_attn`.
    """
    return ring_streaming_llm_attn_varlen(
        q,
        k,
        v,
        window_size=window_size,
        cu_seqlens=cu_seqlens,
        num_sink_tokens=0,
        axis_name=axis_name,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sink_logits=sink_logits,
        implementation=implementation,
    )


def ring_streaming_llm_attn_varlen(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K Hv"],
    *,
    window_size: int | None,
    cu_seqlens: Int[AnyArray, "n"],
    num_sink_tokens: int = 1,
    axis_name: AxisName | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N Hv"]:
    """Sliding-window attention in a packed row that also sees each sequence's own first tokens.

    Query i attends key j of its own sequence, which starts at s, iff ``0 <= i - j <=
    window_size`` (**window_size + 1 keys**) or ``j <= i`` and ``j - s < num_sink_tokens``.

    Args:
        q: queries of the chunk of the packed row.
        k: keys; N is a multiple of K.
        v: values, in the dtype of q and k.
        window_size: W: the W keys before a query and itself; None: all before it. Static.
        cu_seqlens: ends of the sequences, as in `ring_sliding_window_attn_varlen`.
        num_sink_tokens: how many first tokens of its sequence a query sees; at most T on several
            devices.
        axis_name: mesh axis (or tuple of axes) that cuts the packed row, or None.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        sink_logits: a learned logit a query head that enlarges the denominator.
        implementation: "xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic", or None for
            the best deterministic one here.

    Returns:
        The attended values, in the dtype of q.

    Raises:
        ValueError: as `ring_streaming_llm_attn`, and ``cu_seqlens`` that are no vector.
        TypeError: as `ring_streaming_llm_attn`, and ``cu_seqlens`` that are no integers.
        NotImplementedError: as `ring_sliding_window_attn`.
    """
    q, k, v = (_checks.as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    _checks.check_heads(q, k, v, batched=False)
    cu_seqlens = as_cu_seqlens(cu_seqlens)
    axis = SequenceAxis.named(axis_name)
    return attend_chunk(
        q[None],
        k[None],
        v[None],
        axis=axis,
        bounds=from_cu_seqlens(axis, q.shape[0], cu_seqlens),
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sink_logits=sink_logits,
        implementation=implementation,
    )[0]


def attend_chunk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    axis: SequenceAxis,
    bounds: Bounds,
    window_size: int | None,
    num_sink_tokens: int,
    scale: float | None,
    logits_soft_cap: float | None,
    sink_logits: Float[AnyArray, "N"] | None,
    implementation: str | None,
) -> Float[Array, "B T N Hv"]:
    """What the per-shard functions and ring_attention share: checks, exchange, attention."""
    chunk = q.shape[1]
    longest_reach = axis.size * chunk - 1
    window = _checks.static_window(window_size)
    window = None if window is None or window >= longest_reach else window
    num_sinks = _checks.static_sinks(num_sink_tokens)
    num_sinks = 0 if window is None else num_sinks
    _checks.check_sinks_fit(num_sinks, chunk, axis.size)
    if sink_logits is not None:
        sink_logits = _checks.as_array("sink_logits", sink_logits)
    _checks.check_sink_logits(sink_logits, q.shape[2])
    spec = pallas_kernels.Spec(
        window=window,
        num_sinks=min(num_sinks, chunk),
        scale=_checks.static_scale(scale, q.shape[-1]),
        soft_cap=_checks.static_soft_cap(logits_soft_cap),
        precision=matmul_precision(),
    )
    name = pallas_kernels.choose(implementation, spec, q, v)
    if q.shape[0] == 0:
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    return _exchange_and_attend(q, k, v, sink_logits, bounds, axis=axis, spec=spec, name=name)


# The jit is for calls outside of any other, which would compile the loops inside anew each time.
@partial(jax.jit, static_argnames=("axis", "spec", "name"), inline=True)
def _exchange_and_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    sink_logits: Float[Array, "N"] | None,
    bounds: Bounds,
    *,
    axis: SequenceAxis,
    spec: pallas_kernels.Spec,
    name: str,
) -> Float[Array, "B T N Hv"]:
    """Attention with checked settings by the implementation of this name."""
    q, k, v, sink_logits, bounds = same_varying(axis, q, k, v, sink_logits, bounds)
    sinks = None
    if spec.num_sinks and axis.size > 1:
        sinks = fetch_sinks(axis, k, v, bounds, spec.num_sinks)
    halo = RingHalo.of_window(axis, q.shape[1], spec.window)
    return pallas_kernels.attend(spec, halo, name, q, k, v, sinks, sink_logits, bounds.start)


def matmul_precision() -> str:
    """What ``jax.default_matmul_precision`` says, by default IEEE float32."""
    # Type checkers do not see the settings that jax.config makes up as it runs.
    return jax.config.jax_default_matmul_precision or "highest"  # type: ignore[attr-defined]
