"""Flax NNX modules: an attention layer, and an adapter for `flax.nnx.MultiHeadAttention`."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Int

from ring_swa_jax._attention_fn import attention_fn as attention_fn
from ring_swa_jax._axis import AxisName
from ring_swa_jax._layer import AttentionLayer
from ring_swa_jax._rope import Rope

__all__ = ["RingSlidingWindowAttention", "attention_fn"]

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class RingSlidingWindowAttention(nnx.Module):
    r"""Causal self-attention to a sliding window, its sequence cut over the devices of a mesh.

    .. math:: y = \mathrm{attention}(R \, n(x W_q), R \, n(x W_k), x W_v) \, W_o

    where n is an RMSNorm of queries and keys (``qk_norm``) and R turns them by their positions
    (``rope``); `ring_swa_jax.ring_attention` defines the attention. The parameters are those of
    `flax.nnx.MultiHeadAttention`: ``query``, ``key``, ``value`` and ``out``, each with a
    ``kernel`` ([E, N, H], [E, K, H], [E, K, Hv], [N, Hv, out_features]) and a ``bias``; besides
    them ``query_norm`` and ``key_norm`` where there is a norm, and ``sink_logits`` [N].

    Args:
        num_heads: N, the number of query heads.
        in_features: E, features of x.
        num_kv_heads: K, of which N is a multiple; N by default.
        head_dim: H, by default ``in_features // num_heads``.
        value_dim: Hv, features of each value head, by default H.
        out_features: features of the result, by default ``in_features``.
        window_size: W; a token sees **W + 1 keys**: the W before it and itself, as
            FlashAttention's ``(W, 0)``. Hugging Face's ``sliding_window=n`` is ``n - 1`` here.
            None: a full causal layer.
        num_sink_tokens: how many first tokens of its own sequence a token always sees.
        learned_sinks: whether each query head has a learned logit, the parameter ``sink_logits``
            [N], that enlarges its softmax denominator, as in gpt-oss.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        scale: factor of ``q.k``, by default ``head_dim**-0.5``.
        qk_norm: True: an RMSNorm of every head of q and k before the rotation, with a factor [H];
            "all_heads": one of all heads of a token together, with factors [N, H] and [K, H], as
            in OLMo 2 and 3. The factors multiply as they are: Gemma's weights are ``factor - 1``.
        qk_norm_epsilon: added to the mean square.
        rope: rotary settings; None: no rotation.
        mesh: by default that of ``jax.set_mesh``.
        seq_axis: mesh axis or axes (a tuple, major first) that cut the sequence; None: it is not
            cut.
        batch_axis: mesh axis or axes that cut the batch. On Explicit mesh axes None means what
            the sharding of x says.
        head_axis: mesh axis or axes that cut the heads; on Explicit axes None means what the
            sharding of the kernels says.
        implementation: "xla", "triton", "mosaic_gpu" or None for the best here.
        dtype: of the computation; by default inferred from x and the parameters.
        param_dtype: of the parameters.
        precision: of the projections. The attention follows `jax.default_matmul_precision`.
        use_bias: whether the projections have biases.
        use_out_bias: whether the last one has; by default as ``use_bias``.
        kernel_init: initialiser of the kernels.
        out_kernel_init: of the last one; by default ``kernel_init``.
        bias_init: initialiser of the biases.
        out_bias_init: of the last one; by default ``bias_init``.
        qk_norm_init: initialiser of the norms' factors.
        sink_logits_init: initialiser of the learned sinks.
        qkv_promote_dtype: promotes x, kernel and bias of the first three projections to a dtype.
        out_promote_dtype: the same of the last one.
        rngs: random keys.
        kernel_metadata: of the kernels' `nnx.Param`, such as ``{"out_sharding": (...)}``.
        out_kernel_metadata: of the last one's; if empty, ``kernel_metadata``.
        bias_metadata: of the biases.
        out_bias_metadata: of the last one; if empty, ``bias_metadata``.
        query_norm_metadata: of the factor of the queries' norm.
        key_norm_metadata: of the factor of the keys' norm.
        sink_logits_metadata: of the learned sinks.

    Raises:
        ValueError: sizes or settings that do not fit.
        TypeError: settings of another type.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        out_features: int | None = None,
        window_size: int | None,
        num_sink_tokens: int = 0,
        learned_sinks: bool = False,
        logits_soft_cap: float | None = None,
        scale: float | None = None,
        qk_norm: bool | Literal["all_heads"] = False,
        qk_norm_epsilon: float = 1e-6,
        rope: Rope | None = Rope(),  # noqa: B008  frozen
        mesh: Mesh | AbstractMesh | None = None,
        seq_axis: AxisName | None = "seq",
        batch_axis: AxisName | None = None,
        head_axis: AxisName | None = None,
        implementation: str | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        use_bias: bool = True,
        use_out_bias: bool | None = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        out_bias_init: Initializer | None = None,
        qk_norm_init: Initializer = nnx.initializers.ones_init(),  # noqa: B008
        sink_logits_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        qkv_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        out_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        out_kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        out_bias_metadata: Mapping[str, Any] = _NO_METADATA,
        query_norm_metadata: Mapping[str, Any] = _NO_METADATA,
        key_norm_metadata: Mapping[str, Any] = _NO_METADATA,
        sink_logits_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        self.layer = layer = AttentionLayer.create(
            num_heads=num_heads,
            in_features=in_features,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            out_features=out_features,
            window_size=window_size,
            num_sink_tokens=num_sink_tokens,
            learned_sinks=learned_sinks,
            logits_soft_cap=logits_soft_cap,
            scale=scale,
            qk_norm=qk_norm,
            qk_norm_epsilon=qk_norm_epsilon,
            rope=rope,
            mesh=mesh,
            seq_axis=seq_axis,
            batch_axis=batch_axis,
            head_axis=head_axis,
            implementation=implementation,
        )
        linear = functools.partial(
            nnx.LinearGeneral, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs
        )
        project = functools.partial(
            linear,
            layer.in_features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=qkv_promote_dtype,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        self.query = project((layer.num_heads, layer.head_dim))
        self.key = project((layer.num_kv_heads, layer.head_dim))
        self.value = project((layer.num_kv_heads, layer.value_dim))
        self.out = linear(
            (layer.num_heads, layer.value_dim),
            layer.out_features,
            axis=(-2, -1),
            use_bias=use_bias if use_out_bias is None else use_out_bias,
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            promote_dtype=out_promote_dtype,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )

        def parameter(present, init, shape, metadata):
            if not present:
                return nnx.data(None)
            return nnx.Param(init(rngs.params(), shape, param_dtype), **metadata)

        query_shape, key_shape = layer.norm_shapes
        self.query_norm = parameter(qk_norm, qk_norm_init, query_shape, query_norm_metadata)
        self.key_norm = parameter(qk_norm, qk_norm_init, key_shape, key_norm_metadata)
        self.sink_logits = parameter(
            learned_sinks, sink_logits_init, (layer.num_heads,), sink_logits_metadata
        )

    def __call__(
        self,
        x: Float[Array, "B S E"],
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S out_features"]:
        """Attends within whole rows.

        Args:
            x: features of whole rows, in or out of jit.
            segment_ids: a new sequence starts where the id changes; a negative id is padding.
            positions: of the tokens, for the rotation alone; by default they start anew in every
                sequence, or count from 0 where there are no ``segment_ids``.

        Returns:
            The layer's output; a padding token's is the bias of ``out``.

        Raises:
            ValueError: shapes or mesh axes that do not fit.
            TypeError: ids or positions that are not integers.
        """
        layer = self.layer
        layer.check_input(x)
        q, k, v = self._project(x)
        q, k = layer.prepare(
            q,
            k,
            layer.positions(x, segment_ids, positions),
            _value(self.query_norm),
            _value(self.key_norm),
        )
        context = layer.attend(q, k, v, segment_ids, _value(self.sink_logits))
        return self._project_out(context, x)

    def _project(self, x):
        """Queries, keys and values of x, not yet normalised nor rotated."""
        return tuple(
            linear(x, out_sharding=self.layer.sharding_of_heads(x, linear.kernel[...]))
            for linear in (self.query, self.key, self.value)
        )

    def _project_out(self, context, x):
        """The output of a context, sharded as x."""
        return self.out(context, out_sharding=self.layer.sharding_of_output(x))


def _value(parameter: nnx.Param | None) -> Array | None:
    return None if parameter is None else parameter[...]
