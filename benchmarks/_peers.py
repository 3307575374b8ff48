"""What is compared: our implementations, and the other attention kernels that JAX can call.

A builder takes a shape and returns ``attend(query, key, value, cu_seqlens)`` on [1, T, heads, H];
``cu_seqlens`` is None for one sequence. It raises where the peer is missing or cannot do it.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import pallas_kernels
import ring_swa_jax
from benchmarks._shapes import Shape

Attend = Callable[[Array, Array, Array, Array | None], Array]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A row of the comparison.

    Attributes:
        build: makes its function for a shape.
        ours: whether it is one of this library's implementations.
        deterministic: a peer's slower mode that gives the same bits on every run, as all of ours
            do but the one that is named for it.
        special: whether it runs only where it is named.
        options: XLA options to compile it with.
    """

    build: Callable[[Shape], Attend]
    ours: bool = False
    deterministic: bool = False
    special: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def ours(
    implementation: str | None, package: ModuleType = ring_swa_jax
) -> Callable[[Shape], Attend]:
    """The builder of one of this library's implementations, None for the best one."""

    def build(shape: Shape) -> Attend:
        options: dict[str, Any] = {
            "window_size": shape.window_size,
            "num_sink_tokens": shape.sinks,
            "implementation": implementation,
            "sink_logits": jnp.zeros(shape.heads) if shape.learned else None,
        }

        def attend(query, key, value, cu_seqlens):
            if cu_seqlens is None:
                return package.ring_streaming_llm_attn(query, key, value, **options)
            packed = (query[0], key[0], value[0])
            return package.ring_streaming_llm_attn_varlen(
                *packed, cu_seqlens=cu_seqlens, **options
            )[None]

        return attend

    return build


def _no_sinks(shape: Shape) -> None:
    if shape.sinks or shape.learned:
        raise NotImplementedError("takes no sinks")


def _bounded_window(shape: Shape) -> tuple[int, int] | None:
    """The window, where it has both bounds."""
    if shape.window is None or shape.after is None:
        return None
    return shape.window, shape.after


def _cudnn(shape: Shape) -> Attend:
    _no_sinks(shape)
    if not shape.documents:
        window = _bounded_window(shape)
        causal = shape.after == 0
        return lambda query, key, value, _: jax.nn.dot_product_attention(
            query, key, value, is_causal=causal, local_window_size=window, implementation="cudnn"
        )
    # jax.nn offers no packed documents; what it calls does.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def attend(query, key, value, cu_seqlens):
        offsets, lengths = cu_seqlens[None], (cu_seqlens[1:] - cu_seqlens[:-1])[None]
        return cudnn.dot_product_attention(
            query, key, value, q_seqlen=lengths, kv_seqlen=lengths,
            q_offsets=offsets, kv_offsets=offsets, scale=shape.dim**-0.5,
            mask_type=cudnn.MaskType.PADDING_CAUSAL,
            sliding_window_length=None if shape.window is None else shape.window + 1,
        )  # fmt: skip

    return attend


def _flash_attention_3(shape: Shape) -> Attend:
    _no_sinks(shape)
    from flash_attn3_jax import flash_mha, flash_mha_varlen

    causal = shape.after == 0
    window = _flash_window(shape)
    if not shape.documents:
        return lambda query, key, value, _: flash_mha(
            query, key, value, is_causal=causal, window_size=window
        )
    longest = max(shape.documents)
    return lambda query, key, value, cu_seqlens: flash_mha_varlen(
        query[0], key[0], value[0], cu_seqlens,
        max_seqlen_q=longest, max_seqlen_k=longest, is_causal=causal, window_size=window,
    )[None]  # fmt: skip


def _flash_window(shape: Shape) -> tuple[int, int]:
    """The window as FlashAttention writes it; without a bound before, causal or not, no window."""
    if shape.window is None and shape.after == 0:
        return -1, -1
    before, after = (-1 if bound is None else bound for bound in (shape.window, shape.after))
    return before, after


def _flash_attention_3_deterministic(shape: Shape) -> Attend:
    """Only the backward pass for packed sequences has the mode: one sequence is a pack of one."""
    _no_sinks(shape)
    if shape.batch > 1:
        raise NotImplementedError("one row is measured in this mode")
    from flash_attn3_jax.varlen_bwd import flash_mha_varlen_bwd
    from flash_attn3_jax.varlen_fwd import flash_mha_varlen_fwd

    longest = max(shape.documents or (shape.length,))
    config: dict[str, Any] = {
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "is_causal": shape.after == 0,
        "window_size": _flash_window(shape),
    }

    def forward(query, key, value, ends):
        out, lse = flash_mha_varlen_fwd(query, key, value, ends, ends, **config)
        return out, (query, key, value, out, lse, ends)

    def backward(residuals, dout):
        *arrays, ends = residuals
        gradients = flash_mha_varlen_bwd(dout, *arrays, ends, ends, deterministic=True, **config)
        return *gradients, None

    differentiable = jax.custom_vjp(lambda *arrays: forward(*arrays)[0])
    differentiable.defvjp(forward, backward)

    def attend(query, key, value, cu_seqlens):
        ends = jnp.array([0, shape.length], jnp.int32) if cu_seqlens is None else cu_seqlens
        return differentiable(query[0], key[0], value[0], ends)[None]

    return attend


def _tokamax(shape: Shape) -> Attend:
    _no_sinks(shape)
    if shape.documents:
        raise NotImplementedError("takes no packed documents")
    import tokamax

    window = _bounded_window(shape)
    causal = shape.after == 0
    # Its other implementations compute O(S * S) logits in the backward pass.
    return lambda query, key, value, _: tokamax.dot_product_attention(
        query, key, value, is_causal=causal, local_window_size=window, implementation="mosaic"
    )


CONTENDERS = {
    **{name: Contender(ours(name), ours=True) for name in pallas_kernels.IMPLEMENTATIONS[1:]},
    # What differs between these two is noise.
    "mosaic_gpu again": Contender(ours("mosaic_gpu"), ours=True),
    "cudnn": Contender(_cudnn),
    "fa3": Contender(_flash_attention_3),
    "tokamax": Contender(_tokamax),
    "cudnn-deterministic": Contender(
        _cudnn, deterministic=True, options={"xla_gpu_exclude_nondeterministic_ops": True}
    ),
    "fa3-deterministic": Contender(_flash_attention_3_deterministic, deterministic=True),
    "xla": Contender(ours("xla"), ours=True, special=True),
}
