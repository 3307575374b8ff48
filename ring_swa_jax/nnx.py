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
from jaxtyping import Bool, Float, Int

from ring_swa_jax import _serialization as _serialization
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._attention_fn import attention_fn as attention_fn
from ring_swa_jax._axis import AxisName
from ring_swa_jax._cache import Cache
from ring_swa_jax._help import shows_arguments
from ring_swa_jax._layer import AttentionLayer, KeysValues, Learned, Projected, SharedKeysValues
from ring_swa_jax._layer_decode import decode, init_cache, keys_values, prefill
from ring_swa_jax._query_scaling import QueryScaling
from ring_swa_jax._rope import Rope
from ring_swa_jax._window import WindowSize

__all__ = ["RingSlidingWindowAttention", "attention_fn"]

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


@shows_arguments
class RingSlidingWindowAttention(nnx.Module):
    r"""Self-attention to a sliding window, its sequence cut over the devices of a mesh.

    .. math:: y = \mathrm{attention}(R \, n(x W_q), R \, n(x W_k), x W_v) \, W_o

    where n is an RMSNorm of queries and keys (``qk_norm``) and R rotates them by their positions
    (``rope``); `ring_swa_jax.ring_attention` defines the attention. The parameters are those of
    `flax.nnx.MultiHeadAttention`: ``query``, ``key``, ``value`` and ``out``, each with a
    ``kernel`` ([E, N, H], [E, K, H], [E, K, Hv], [N, Hv, out_features]) and a ``bias``; besides
    them ``query_norm`` and ``key_norm`` where there is a norm, ``sink_logits`` [N], and ``gate``
    with a ``kernel`` ([E, N, 1] or [E, N, Hv]) where there is an output gate.

    Args:
        num_heads: N, the number of query heads.
        in_features: E, features of x.
        num_kv_heads: K, of which N is a multiple; N by default.
        head_dim: H, by default ``in_features // num_heads``.
        value_dim: Hv, features of each value head, by default H.
        out_features: features of the result, by default ``in_features``.
        window_size: W; a token sees **W + 1 keys**: the W before it and itself, as
            FlashAttention's ``(W, 0)``. Hugging Face's ``sliding_window=n`` is ``n - 1`` here.
            None: a full causal layer. A pair (L, R): L before and R after it, None for no bound;
            (None, None) is a full layer that is not causal. A cache takes no R.
        num_sink_tokens: how many first tokens of its own sequence a token always sees.
        learned_sinks: whether each query head has a learned logit, the parameter ``sink_logits``
            [N], that enlarges its softmax denominator, as in gpt-oss.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        scale: factor of ``q.k``, by default ``head_dim**-0.5``.
        qk_norm: True: an RMSNorm of every head of q and k before the rotation, with a factor [H];
            "all_heads": one of all heads of a token together, with factors [N, H] and [K, H], as
            in OLMo 2 and 3. The factors multiply as they are: Gemma's weights are ``factor - 1``.
        qk_norm_epsilon: added to the mean square, of the other norms too.
        qk_norm_scale: whether the norms of q and k have factors; False as in Llama 4.
        qk_norm_after_rope: whether they come after the rotation, as in Hunyuan and Llama 4.
        value_norm: an RMSNorm of every head of v, without factor, as in Gemma 3n and 4.
        context_norm: an RMSNorm of every head of the attended values, without factor, before the
            output gate.
        rope: rotary settings, `ring_swa_jax.Rope`; None: no rotation, as in Flax's own attention.
            There is no default: with a wrong one a model would run and be wrong.
        query_scaling: a factor of the queries that grows with their position, after rotation and
            norm, as in Ministral 3 and Llama 4; positions are those of the rotation.
        attention_chunk_size: C; the query at position p of its document sees the keys from
            ``p - p % C`` on, as in Llama 4's layers that rotate (`ring_swa_jax.chunk_segment_ids`).
            Goes with ``window_size=None``.
        key_as_value: the values are the keys before their norm and rotation, and there is no
            ``value``, as in Gemma 4's layers without a window.
        kv_shared: keys and values come from an earlier layer, with each call, and there is neither
            ``key`` nor ``value``, as in the upper layers of Gemma 3n and 4.
        output_gate: "elementwise": the attended values are multiplied by a gate computed from x,
            one for each feature; "headwise": one for each head. None: no gate.
        output_gate_activation: "sigmoid", or "softplus" as in Laguna.
        mesh: by default that of ``jax.set_mesh``.
        seq_axis: mesh axis or axes (a tuple, major first) that cut the sequence; None: it is not
            cut.
        batch_axis: mesh axis or axes that cut the batch. On Explicit mesh axes None means what
            the sharding of x says.
        head_axis: mesh axis or axes that cut the heads; on Explicit axes None means what the
            sharding of the kernels says.
        layout: the order of the tokens of x: "contiguous", or "dual_chunk", where device r of P
            holds half chunks r and 2P-1-r; segment ids, positions and results are in the same
            order.
        exchange: how keys get to the devices whose queries see them: "halo", "all_to_all", "ring"
            or None, as `ring_swa_jax.ring_attention` says.
        implementation: "xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic", or None for
            the best deterministic one here.
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
        window_size: WindowSize,
        num_sink_tokens: int = 0,
        learned_sinks: bool = False,
        logits_soft_cap: float | None = None,
        scale: float | None = None,
        qk_norm: bool | Literal["all_heads"] = False,
        qk_norm_epsilon: float = 1e-6,
        qk_norm_scale: bool = True,
        qk_norm_after_rope: bool = False,
        value_norm: bool = False,
        context_norm: bool = False,
        rope: Rope | None,
        query_scaling: QueryScaling | None = None,
        attention_chunk_size: int | None = None,
        key_as_value: bool = False,
        kv_shared: bool = False,
        output_gate: Literal["headwise", "elementwise"] | None = None,
        output_gate_activation: Literal["sigmoid", "softplus"] = "sigmoid",
        mesh: Mesh | AbstractMesh | None = None,
        seq_axis: AxisName | None = "seq",
        batch_axis: AxisName | None = None,
        head_axis: AxisName | None = None,
        layout: str = "contiguous",
        exchange: str | None = None,
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
        # The parameters by name, of which the layer takes its settings.
        self.layer = layer = AttentionLayer.create(locals())
        linear = functools.partial(
            nnx.LinearGeneral, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs
        )
        project = functools.partial(
            linear,
            layer.in_features,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=qkv_promote_dtype,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )

        def projection(name):
            if (shape := layer.projections[name]) is None:
                return nnx.data(None)
            return project(shape, use_bias=use_bias and name != "gate")

        self.query = projection("query")
        self.key = projection("key")
        self.value = projection("value")
        self.gate = projection("gate")
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

        def parameter(init, shape, metadata):
            if shape is None:
                return nnx.data(None)
            return nnx.Param(init(rngs.params(), shape, param_dtype), **metadata)

        query_shape, key_shape = layer.norm_shapes
        sinks_shape = (layer.num_heads,) if learned_sinks else None
        self.query_norm = parameter(qk_norm_init, query_shape, query_norm_metadata)
        self.key_norm = parameter(qk_norm_init, key_shape, key_norm_metadata)
        self.sink_logits = parameter(sink_logits_init, sinks_shape, sink_logits_metadata)

    def __call__(
        self,
        x: Float[AnyArray, "B S E"],
        *,
        segment_ids: Int[AnyArray, "B S"] | None = None,
        positions: Int[AnyArray, "B S"] | None = None,
        shared_kv: SharedKeysValues | None = None,
    ) -> Float[Array, "B S out_features"]:
        """Attends within whole rows.

        Args:
            x: features of whole rows, in or out of jit.
            segment_ids: a new sequence starts where the id changes; a negative id is padding.
            positions: of the tokens, for the rotation alone; by default they start anew in every
                sequence, or count from 0 where there are no ``segment_ids``.
            shared_kv: `keys_values` of an earlier layer, for a layer with ``kv_shared``.

        Returns:
            The layer's output; a padding token's is the bias of ``out``.

        Raises:
            ValueError: shapes or mesh axes that do not fit.
            TypeError: ids or positions that are not integers.
        """
        x = self.layer.check_input(x)
        context = self.layer.forward(
            self._project(x),
            self._learned(),
            segment_ids=segment_ids,
            positions=positions,
            shared_kv=shared_kv,
        )
        return self._project_out(context, x)

    def keys_values(
        self,
        x: Float[AnyArray, "B S E"],
        *,
        segment_ids: Int[AnyArray, "B S"] | None = None,
        positions: Int[AnyArray, "B S"] | None = None,
        cache: Cache | None = None,
        valid: Bool[AnyArray, "B S"] | None = None,
    ) -> KeysValues:
        """Keys and values as this layer's queries meet them, for later layers with ``kv_shared``.

        If the layer is called on the same x in the same jit, nothing is computed twice.

        Args:
            x: features, those of the layer's call, `prefill` or `decode`.
            segment_ids: as in a call.
            positions: as in a call.
            cache: the cache that `decode` is given; None for a call or `prefill`.
            valid: as in `decode`.

        Raises:
            ValueError: a layer that has no keys of its own.
        """
        x = self.layer.check_input(x)
        return keys_values(
            self.layer,
            self._project(x),
            self._learned(),
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            valid=valid,
        )

    def init_cache(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        max_trim: int = 1,
        dtype: Dtype | None = None,
        relative_positions: bool = False,
    ) -> Cache:
        """An empty cache of this layer, for `decode`.

        Args:
            batch_size: number of rows, B.
            max_length: the most tokens that a row will have; needed where ``window_size=None``.
            max_trim: how many tokens `ring_swa_jax.trim_cache` may take back at a time.
            dtype: of keys and values, which is that of the projections of x; by default the
                module's dtype, or its parameters' where it has none.
            relative_positions: whether to decode with cache-relative positions (see `decode`).

        Raises:
            ValueError: sizes that do not fit, or neither a window nor ``max_length``.
            TypeError: sizes that are not static integers, or a dtype that is not floating-point.
        """
        return init_cache(
            self.layer,
            batch_size,
            max_length=max_length,
            max_trim=max_trim,
            dtype=dtype or self.query.dtype or self.query.param_dtype,
            relative_positions=relative_positions,
        )

    def prefill(
        self,
        x: Float[AnyArray, "B S E"],
        *,
        segment_ids: Int[AnyArray, "B S"] | None = None,
        positions: Int[AnyArray, "B S"] | None = None,
        max_length: int | None = None,
        max_trim: int = 1,
        relative_positions: bool = False,
    ) -> tuple[Float[Array, "B S out_features"], Cache]:
        """Attends within whole rows, as a call does, and keeps what `decode` goes on with.

        Args:
            x: features of whole rows, the sequence cut over the mesh as in a call.
            segment_ids: a new sequence starts where the id changes; a negative id is padding, on
                either side. `decode` goes on with each row's last sequence.
            positions: as in a call; if given here, then give them to `decode` too.
            max_length: the most tokens that a row will have; needed where ``window_size=None``.
            max_trim: how many tokens `ring_swa_jax.trim_cache` may take back at a time.
            relative_positions: cache-relative positions, see `decode`. The results equal those of
                `decode`, token by token. With ``num_sink_tokens``, a prompt longer than
                ``num_sink_tokens + window_size + 1`` is attended chunk after chunk on a sequence
                that is not cut, and token after token where there are ``segment_ids``.

        Returns:
            The layer's output, and the cache.

        Raises:
            ValueError: shapes or mesh axes that do not fit, a prompt longer than ``max_length``,
                ``relative_positions`` with ``positions``, or with a long prompt that is cut over
                devices; a layer with ``kv_shared``, which is called instead.
            TypeError: ids or positions that are not integers.
        """
        x = self.layer.check_input(x)
        context, cache = prefill(
            self.layer,
            self._project(x),
            self._learned(),
            segment_ids=segment_ids,
            positions=positions,
            max_length=max_length,
            max_trim=max_trim,
            relative_positions=relative_positions,
        )
        return self._project_out(context, x), cache

    def decode(
        self,
        x: Float[AnyArray, "B T E"],
        cache: Cache,
        *,
        valid: Bool[AnyArray, "B T"] | None = None,
        positions: Int[AnyArray, "B T"] | None = None,
        shared_kv: SharedKeysValues | None = None,
    ) -> tuple[Float[Array, "B T out_features"], Cache]:
        """Attends from the next tokens of each row: a call on the whole sequence, to rounding.

        The cost does not depend on how long the sequence has become. *Cache-relative positions*
        (StreamingLLM; ``relative_positions=True`` where the cache was made) are counted among the
        keys that a token still sees instead of in its whole sequence, so that none exceeds
        ``num_sink_tokens + window_size``. However long the stream, angles stay in the range seen
        in training. `ring_swa_jax.decode_attention` defines both kinds of positions.

        Args:
            x: features of T >= 1 new tokens a row. No mesh axis may cut T.
            cache: of this layer, after the tokens before. For a layer with ``kv_shared`` the
                earlier layer's, as that layer's `decode` was given it.
            valid: False for padding, which is not counted; None: all are tokens.
            positions: of the new tokens, for the rotation alone; by default they go on counting.
            shared_kv: `keys_values` of the earlier layer with that cache, for a layer with
                ``kv_shared``.

        Returns:
            The layer's output (a padding token's is the bias of ``out``) and the cache with the
            new tokens, or the cache as it was for a layer with ``kv_shared``. Tokens past the
            cache's ``max_length`` get NaN.

        Raises:
            ValueError: shapes that do not fit, a cache of another layer, or ``positions`` with a
                cache of relative ones.
            TypeError: a dtype that is not the cache's, or no cache.
        """
        x = self.layer.check_input(x)
        context, cache = decode(
            self.layer,
            self._project(x),
            self._learned(),
            cache,
            valid=valid,
            positions=positions,
            shared_kv=shared_kv,
        )
        return self._project_out(context, x), cache

    def _learned(self) -> Learned:
        return Learned(*map(_value, (self.query_norm, self.key_norm, self.sink_logits)))

    def _project(self, x: Float[Array, "B S E"]) -> Projected:
        """The projections of x, not yet normalised nor rotated."""

        def project(linear):
            if linear is None:
                return None
            return linear(x, out_sharding=self.layer.sharding_of_heads(x, linear.kernel[...]))

        return Projected(*(project(getattr(self, name)) for name in Projected._fields))

    def _project_out(
        self, context: Float[Array, "B S N Hv"], x: Float[Array, "B S E"]
    ) -> Float[Array, "B S out_features"]:
        """The output of a context, sharded as x."""
        return self.out(context, out_sharding=self.layer.sharding_of_output(x))


def _value(parameter: nnx.Param | None) -> Float[Array, "..."] | None:
    # A restored checkpoint may hold NumPy arrays.
    return None if parameter is None else jnp.asarray(parameter[...])
