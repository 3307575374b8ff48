"""The adapter for the attention modules of Flax itself."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype, PrecisionLike
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Shaped

from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import AxisName
from ring_swa_jax._exchange import check_exchange
from ring_swa_jax._layout import check_layout
from ring_swa_jax._linen_init import axes_that_divide, initialising, repeated_work_is_meant
from ring_swa_jax._sharded import ring_attention
from ring_swa_jax._window import WindowSize, static_window


def attention_fn(
    *,
    window_size: WindowSize,
    num_sink_tokens: int = 0,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    seq_axis: AxisName | None = "seq",
    batch_axis: AxisName | None = None,
    head_axis: AxisName | None = None,
    layout: str = "contiguous",
    exchange: str | None = None,
    implementation: str | None = None,
) -> "AttentionFn":
    """A function for the ``attention_fn`` of Flax's own attention modules.

    For `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention` as they are.
    ``window_size`` says what is seen, **whatever the module says**: a number or None is causal, a
    pair (L, R) sees R keys after the query. Both modules say ``is_causal=False``, or nothing, by
    default. Functions made with the same settings compare equal, so jit does not
    compile twice.

    Flax's modules have no rotations or learned sinks; `RingSlidingWindowAttention` has. For packed
    rows and padding pass integer ids [..., S] as the module's ``mask``. They are the
    ``segment_ids`` of ``ring_attention``: a negative id is padding.

    Args:
        window_size: W; a token sees **W + 1 keys**: the W before it and itself, as
            FlashAttention's ``(W, 0)``. Hugging Face's ``sliding_window=n`` is ``n - 1`` here.
            None: all keys before it. A pair (L, R): L before and R after it, None for no bound;
            (None, None) is full attention, not causal.
        num_sink_tokens: how many first tokens of the sequence a token always sees.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        mesh: by default that of ``jax.set_mesh``.
        seq_axis: mesh axis or axes that cut the sequence; None: it is not cut.
        batch_axis: mesh axis or axes that cut the batch.
        head_axis: mesh axis or axes that cut the heads.
        layout: the order of the tokens: "contiguous", or "dual_chunk", where device r of P holds
            half chunks r and 2P-1-r.
        exchange: how keys get to the devices whose queries see them: "halo", "all_to_all", "ring"
            or None, as `ring_swa_jax.ring_attention` says.
        implementation: "xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic", or None for
            the best deterministic one here.

    Returns:
        A function of query [..., S, N, H], key [..., S, K, H] and value [..., S, K, Hv] that
        returns [..., S, N, Hv]. It raises ValueError if asked for what it does not do: a mask that
        is no ids (Flax's cache, ``decode=True``, uses one), dropout, weights to sow, positions, or
        einsums of one's own.

    Raises:
        ValueError: settings that do not fit.
        TypeError: settings that are not static.
    """
    check_layout(layout)
    check_exchange(exchange)
    return AttentionFn(
        window_size=static_window(window_size),
        num_sink_tokens=_checks.static_sinks(num_sink_tokens),
        logits_soft_cap=_checks.static_soft_cap(logits_soft_cap),
        scale=scale,
        mesh=mesh,
        seq_axis=seq_axis,
        batch_axis=batch_axis,
        head_axis=head_axis,
        layout=layout,
        exchange=exchange,
        implementation=implementation,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionFn:
    """What `attention_fn` returns."""

    window_size: WindowSize
    num_sink_tokens: int
    logits_soft_cap: float | None
    scale: float | None
    mesh: Mesh | AbstractMesh | None
    seq_axis: AxisName | None
    batch_axis: AxisName | None
    head_axis: AxisName | None
    layout: str
    exchange: str | None
    implementation: str | None

    # Linen silently drops arguments that this signature does not name, so refused ones are named
    # too.
    def __call__(
        self,
        query: Float[AnyArray, "*batch S N H"],
        key: Float[AnyArray, "*batch S K H"],
        value: Float[AnyArray, "*batch S K Hv"],
        *,
        bias: Shaped[AnyArray, "..."] | None = None,
        mask: Shaped[AnyArray, "..."] | None = None,
        dropout_rng: Shaped[Array, "..."] | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = True,
        dtype: Dtype | None = None,
        precision: PrecisionLike = None,
        module: object = None,
        is_causal: bool = True,
        input_positions: Shaped[AnyArray, "..."] | None = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: object = None,
        attn_weights_value_einsum: object = None,
    ) -> Float[Array, "*batch S N Hv"]:
        """Attends; the arguments are those of Flax's `dot_product_attention`."""
        # These need nothing: the softmax is always float32, and window_size says what is causal.
        del is_causal, force_fp32_for_softmax, broadcast_dropout, dropout_rng
        query = jnp.asarray(query)
        if mask is not None and not isinstance(mask, Array):
            mask = np.asarray(mask)  # as it is: JAX would cut off the upper half of 64-bit ids
        refused = {
            "a bias": bias is not None,
            "a mask (window_size says what is seen; for packed rows and padding "
            "the mask may be integer segment ids [B, S])": mask is not None
            and not (np.issubdtype(mask.dtype, np.integer) and mask.shape == query.shape[:-2]),
            f"dropout_rate={dropout_rate}": dropout_rate > 0 and not deterministic,
            "sow_weights=True (the weights are never in memory)": module is not None,
            "input_positions": input_positions is not None,
            "qk_attn_weights_einsum": qk_attn_weights_einsum is not None,
            "attn_weights_value_einsum": attn_weights_value_einsum is not None,
        }
        if any(refused.values()):
            names = ", ".join(name for name, given in refused.items() if given)
            raise ValueError(f"the attention_fn of ring_swa_jax cannot honour {names}")
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
        batch = query.shape[:-3]
        rows = [x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
        ids = None if mask is None else mask.reshape(-1, mask.shape[-1])
        with _matmul_precision(precision):
            context = self._attend(rows, ids)
        return context.reshape(*batch, *context.shape[-3:])

    def _attend(self, rows, segment_ids):
        if not initialising():
            return ring_attention(*rows, segment_ids=segment_ids, **vars(self))
        axes = axes_that_divide(rows[0].shape, self.mesh, self.seq_axis, self.batch_axis)
        with repeated_work_is_meant():
            return ring_attention(*rows, segment_ids=segment_ids, **(vars(self) | axes))


def _matmul_precision(precision: PrecisionLike):
    """A context with the module's ``precision``, or JAX's default where it is None."""
    if precision is None:
        return contextlib.nullcontext()
    first, second = precision if isinstance(precision, tuple) else (precision, precision)
    if first != second:
        raise ValueError(f"precision must be the same for both operands, got {precision}")
    name = first.name.lower() if isinstance(first, jax.lax.Precision) else first
    return jax.default_matmul_precision(name)
