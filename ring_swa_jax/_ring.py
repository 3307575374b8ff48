"""Attention on one chunk of a sequence, called inside the user's own ``jax.shard_map``."""

from jax import Array
from jaxtyping import Float, Int

from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._attend_chunk import attend_chunk
from ring_swa_jax._axis import AxisName, SequenceAxis
from ring_swa_jax._integers import as_cu_seqlens
from ring_swa_jax._window import WindowSize


def ring_sliding_window_attn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    window_size: WindowSize,
    axis_name: AxisName | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    exchange: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    r"""Sliding-window attention of one chunk of a sequence that is cut over a mesh axis.

    Query i attends key j iff ``0 <= i - j <= window_size``, or for a pair (L, R) iff ``i - j <= L``
    and ``j - i <= R``:

    .. math:: o_i = \frac{\sum_j e^{s_{ij}} v_j}{e^{z} + \sum_j e^{s_{ij}}},
        \quad s_{ij} = \mathrm{cap}(q_i \cdot k_j \cdot \mathrm{scale})

    with :math:`e^z` only where there are ``sink_logits``. Under a window each device receives the
    ``min(window_size, keys before it)`` keys before its chunk, likewise R keys after it for a pair,
    and no others.

    Args:
        q: queries of the chunk; the chunk of axis index r holds positions r*T..(r+1)*T-1.
        k: keys; N is a multiple of K.
        v: values, in the dtype of q and k.
        window_size: W; a query sees **W + 1 keys**: the W before it and itself, as
            FlashAttention's ``(W, 0)``. Hugging Face's ``sliding_window=n`` is ``n - 1`` here.
            None: all keys before it. A pair (L, R): L before and R after it, None for no bound;
            (None, None) is full attention, not causal. Static.
        axis_name: mesh axis (or tuple of axes, major first) that cuts the sequence; None when
            the whole sequence is here.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        sink_logits: one learned logit for each query head, in the softmax's denominator alone.
        exchange: how keys get to the devices whose queries see them. "halo": a device receives the
            keys that its windows reach. "all_to_all": it receives the whole sequence of its share
            of the heads; the number of devices must divide the query heads. "ring": all keys visit
            all devices, for windows that lack a bound. None: "all_to_all" without a window and
            for a long one (docs/how_it_works.md has the rule), where possible and the axis lies
            within one host; else "halo" for a window with both bounds, "ring" for others.
        implementation: "xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic", or None for
            the best deterministic one here.

    Returns:
        The attended values, in the dtype of q.

    Raises:
        ValueError: shapes, head counts, axis name, window, exchange or name that do not fit.
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
        exchange=exchange,
        implementation=implementation,
    )


def ring_streaming_llm_attn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    window_size: WindowSize,
    num_sink_tokens: int = 1,
    axis_name: AxisName | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    exchange: str | None = None,
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
        window_size: W: the W keys before a query and itself; None: all before it; (L, R): L before
            and R after it. Static.
        num_sink_tokens: how many first tokens every query sees; at most T on several devices,
            except with exchange="all_to_all".
        axis_name: mesh axis (or tuple of axes) that cuts the sequence, or None.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        sink_logits: one learned logit for each query head, in the softmax's denominator alone.
        exchange: how keys get to the devices whose queries see them. "halo": a device receives the
            keys that its windows reach. "all_to_all": it receives the whole sequence of its share
            of the heads; the number of devices must divide the query heads. "ring": all keys visit
            all devices, for windows that lack a bound. None: "all_to_all" without a window and
            for a long one (docs/how_it_works.md has the rule), where possible and the axis lies
            within one host; else "halo" for a window with both bounds, "ring" for others.
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
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sink_logits=sink_logits,
        exchange=exchange,
        implementation=implementation,
    )


def ring_sliding_window_attn_varlen(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K Hv"],
    *,
    window_size: WindowSize,
    cu_seqlens: Int[AnyArray, "n"],
    axis_name: AxisName | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    exchange: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N Hv"]:
    """Sliding-window attention inside each sequence of a packed row that is cut over an axis.

    Query i attends key j of its own sequence iff ``0 <= i - j <= window_size``
    (**window_size + 1 keys**). Otherwise as `ring_sliding_window_attn`, without the batch.

    Args:
        q: queries of the chunk of the packed row.
        k: keys; N is a multiple of K.
        v: values, in the dtype of q and k.
        window_size: W: the W keys before a query and itself; None: all before it; (L, R): L before
            and R after it. Static.
        cu_seqlens: ends of the sequences in the *global* packed row, the same on every device:
            first 0, non-decreasing. Empty sequences and repeated last entries are fine; tokens
            past the last entry are padding, with zeros as result and gradient. The values are
            never read on the host.
        axis_name: mesh axis (or tuple of axes) that cuts the packed row, or None.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        sink_logits: one learned logit for each query head, in the softmax's denominator alone.
        exchange: how keys get to the devices whose queries see them. "halo": a device receives the
            keys that its windows reach. "all_to_all": it receives the whole sequence of its share
            of the heads; the number of devices must divide the query heads. "ring": all keys visit
            all devices, for windows that lack a bound. None: "all_to_all" without a window and
            for a long one (docs/how_it_works.md has the rule), where possible and the axis lies
            within one host; else "halo" for a window with both bounds, "ring" for others.
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
        exchange=exchange,
        implementation=implementation,
    )


def ring_streaming_llm_attn_varlen(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K Hv"],
    *,
    window_size: WindowSize,
    cu_seqlens: Int[AnyArray, "n"],
    num_sink_tokens: int = 1,
    axis_name: AxisName | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    exchange: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N Hv"]:
    """Sliding-window attention in a packed row that also sees each sequence's own first tokens.

    Query i attends key j of its own sequence, which starts at s, iff ``0 <= i - j <=
    window_size`` (**window_size + 1 keys**) or ``j <= i`` and ``j - s < num_sink_tokens``.

    Args:
        q: queries of the chunk of the packed row.
        k: keys; N is a multiple of K.
        v: values, in the dtype of q and k.
        window_size: W: the W keys before a query and itself; None: all before it; (L, R): L before
            and R after it. Static.
        cu_seqlens: ends of the sequences, as in `ring_sliding_window_attn_varlen`.
        num_sink_tokens: how many first tokens of its sequence a query sees; at most T on several
            devices, except with exchange="all_to_all".
        axis_name: mesh axis (or tuple of axes) that cuts the packed row, or None.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        sink_logits: one learned logit for each query head, in the softmax's denominator alone.
        exchange: how keys get to the devices whose queries see them. "halo": a device receives the
            keys that its windows reach. "all_to_all": it receives the whole sequence of its share
            of the heads; the number of devices must divide the query heads. "ring": all keys visit
            all devices, for windows that lack a bound. None: "all_to_all" without a window and
            for a long one (docs/how_it_works.md has the rule), where possible and the axis lies
            within one host; else "halo" for a window with both bounds, "ring" for others.
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
        cu_seqlens=cu_seqlens,
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        sink_logits=sink_logits,
        exchange=exchange,
        implementation=implementation,
    )[0]
