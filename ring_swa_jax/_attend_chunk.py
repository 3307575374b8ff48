"""Attention of one chunk: what the per-shard functions and ring_attention share."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

import pallas_kernels
from ring_swa_jax import _all_to_all, _balanced_ring, _checks, _full_ring, _halo
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._exchange import choose_exchange
from ring_swa_jax._layout import HalfChunks
from ring_swa_jax._window import Window, WindowSize


def attend_chunk(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    axis: SequenceAxis,
    cu_seqlens: Int[Array, "n"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    window_size: WindowSize,
    num_sink_tokens: int,
    scale: float | None,
    logits_soft_cap: float | None,
    sink_logits: Float[AnyArray, "N"] | None,
    layout: str = "contiguous",
    exchange: str | None,
    implementation: str | None,
) -> Float[Array, "B T N Hv"]:
    """Checks the settings, chooses the exchange, attends."""
    chunk, heads = q.shape[1:3]
    length = axis.size * chunk
    window = Window.of(window_size)
    num_sinks = _checks.static_sinks(num_sink_tokens)
    if sink_logits is not None:
        sink_logits = _checks.as_array("sink_logits", sink_logits)
    _checks.check_sink_logits(sink_logits, heads)
    exchange = choose_exchange(
        exchange, axis, chunk=chunk, heads=heads, window=window, num_sinks=num_sinks
    )
    before, after = window.reach(length)
    spec = pallas_kernels.Spec(
        window=None if before is None else before + after,
        lookahead=after,
        num_sinks=0 if before is None else min(num_sinks, length),
        scale=_checks.static_scale(scale, q.shape[-1]),
        soft_cap=_checks.static_soft_cap(logits_soft_cap),
        precision=matmul_precision(),
    )
    if q.shape[0] == 0:
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    return _exchange_and_attend(
        q, k, v, sink_logits, cu_seqlens, segment_ids,
        axis=axis, layout=layout, exchange=exchange, spec=spec, implementation=implementation,
    )  # fmt: skip


# The jit is for calls outside of any other, which would compile the loops inside anew each time.
@partial(
    jax.jit,
    static_argnames=("axis", "layout", "exchange", "spec", "implementation"),
    inline=True,
)
def _exchange_and_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    sink_logits: Float[Array, "N"] | None,
    cu_seqlens: Int[Array, "n"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    axis: SequenceAxis,
    layout: str,
    exchange: str,
    spec: pallas_kernels.Spec,
    implementation: str | None,
) -> Float[Array, "B T N Hv"]:
    """Attention with checked settings."""
    if layout == "dual_chunk" and axis.size > 1 and segment_ids is not None:
        segment_ids = HalfChunks(axis, q.shape[1]).from_dual_chunks(segment_ids)
    ring = _full_ring if spec.lookahead else _balanced_ring
    attend = {"halo": _halo.attend, "all_to_all": _all_to_all.attend, "ring": ring.attend}
    return attend[exchange](
        q, k, v, sink_logits, cu_seqlens, segment_ids,
        axis=axis, layout=layout, spec=spec, implementation=implementation,
    )  # fmt: skip


def matmul_precision() -> str:
    """What ``jax.default_matmul_precision`` says, by default IEEE float32."""
    # jax.config makes its attributes at run time, so type checkers do not know them.
    return jax.config.jax_default_matmul_precision or "highest"  # type: ignore[attr-defined]
