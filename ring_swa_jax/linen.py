"""Flax Linen modules: an attention layer, and an adapter for Flax's own attention."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array, lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Bool, Float, Int, Shaped

from ring_swa_jax import _checks, nnx
from ring_swa_jax import _serialization as _serialization
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._attention_fn import attention_fn as attention_fn
from ring_swa_jax._axis import AxisName, explicit_axes
from ring_swa_jax._cache import Cache
from ring_swa_jax._help import shows_fields_as
from ring_swa_jax._layer import AttentionLayer, KeysValues, Learned, Projected, SharedKeysValues
from ring_swa_jax._layer_decode import decode, init_cache, keys_values, prefill
from ring_swa_jax._linen_init import axes_that_divide, repeated_work_is_meant
from ring_swa_jax._query_scaling import QueryScaling
from ring_swa_jax._rope import Rope
from ring_swa_jax._window import WindowSize

__all__ = ["RingSlidingWindowAttention", "attention_fn"]


def _lecun_normal(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Flax's default, which as Flax makes it, inside of a function, could not be pickled."""
    return nn.initializers.lecun_normal()(key, shape, dtype)


class _Parts(NamedTuple):
    """The layer's submodules and parameters."""

    projections: list[Any]  # submodules, in `Projected`'s order, None for none
    out: nn.DenseGeneral
    learned: Learned

    def project(self, x: Float[Array, "B S E"]) -> Projected:
        """The projections of x, not yet normalised nor rotated."""
        query, *rest = self.projections
        return Projected(query(x), *(None if p is None else p(x) for p in rest))


@shows_fields_as(nnx.RingSlidingWindowAttention)
class RingSlidingWindowAttention(nn.Module):
    """Self-attention to a sliding window, its sequence cut over the devices of a mesh.

    The settings, parameters and maths are those of `ring_swa_jax.nnx.RingSlidingWindowAttention`,
    except that ``in_features`` may be left to the first x and that metadata such as logical axes
    are given through the initialisers, as everywhere in Linen:
    ``kernel_init=nn.with_logical_partitioning(init, ("embed", "heads", "kv"))``.

    Raises:
        ValueError: sizes or settings that do not fit.
        TypeError: settings of another type.
    """

    num_heads: int
    in_features: int | None = None
    _: dataclasses.KW_ONLY
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    out_features: int | None = None
    window_size: WindowSize
    num_sink_tokens: int = 0
    learned_sinks: bool = False
    logits_soft_cap: float | None = None
    scale: float | None = None
    qk_norm: bool | Literal["all_heads"] = False
    qk_norm_epsilon: float = 1e-6
    qk_norm_scale: bool = True
    qk_norm_after_rope: bool = False
    value_norm: bool = False
    context_norm: bool = False
    rope: Rope | None
    query_scaling: QueryScaling | None = None
    attention_chunk_size: int | None = None
    key_as_value: bool = False
    kv_shared: bool = False
    output_gate: Literal["headwise", "elementwise"] | None = None
    output_gate_activation: Literal["sigmoid", "softplus"] = "sigmoid"
    mesh: Mesh | AbstractMesh | None = None
    seq_axis: AxisName | None = "seq"
    batch_axis: AxisName | None = None
    head_axis: AxisName | None = None
    layout: str = "contiguous"
    exchange: str | None = None
    implementation: str | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    use_bias: bool = True
    use_out_bias: bool | None = None
    kernel_init: Initializer = _lecun_normal
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    out_bias_init: Initializer | None = None
    qk_norm_init: Initializer = nn.initializers.ones_init()
    sink_logits_init: Initializer = nn.initializers.zeros_init()
    qkv_promote_dtype: Callable[..., list[Any]] = promote_dtype
    out_promote_dtype: Callable[..., list[Any]] = promote_dtype

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
            x: features of whole rows, in or out of jit. While the module initialises, the mesh
                need not divide its rows and tokens.
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
        x = _checks.as_array("x", x)
        layer, parts = self._layer_and_parts(x)
        projected = parts.project(x)
        meant: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.is_initializing():
            axes = axes_that_divide(x.shape, layer.mesh, layer.seq_axis, layer.batch_axis)
            layer, meant = dataclasses.replace(layer, **axes), repeated_work_is_meant()
        with meant:
            context = layer.forward(
                projected,
                parts.learned,
                segment_ids=segment_ids,
                positions=positions,
                shared_kv=shared_kv,
            )
        return parts.out(context)

    def keys_values(
        self,
        x: Float[AnyArray, "B S E"],
        *,
        segment_ids: Int[AnyArray, "B S"] | None = None,
        positions: Int[AnyArray, "B S"] | None = None,
        cache: Cache | None = None,
        valid: Bool[AnyArray, "B S"] | None = None,
    ) -> KeysValues:
        """Keys and values for later layers with ``kv_shared``, as the NNX module's.

        ``kv = module.apply(variables, x, method="keys_values")``
        """
        x = _checks.as_array("x", x)
        layer, parts = self._layer_and_parts(x)
        return keys_values(
            layer,
            parts.project(x),
            parts.learned,
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            valid=valid,
        )

    @nn.nowrap
    def init_cache(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        max_trim: int = 1,
        dtype: Dtype | None = None,
        relative_positions: bool = False,
    ) -> Cache:
        """An empty cache of this layer, as the NNX module's; needs no parameters.

        Raises:
            ValueError: besides, neither ``head_dim`` nor ``in_features`` are given.
        """
        if self.in_features is not None:
            in_features = self.in_features
        elif self.head_dim is not None:
            in_features = self.num_heads * self.head_dim  # any number: no cache depends on it
        else:
            raise ValueError("init_cache does not see x: give the module in_features or head_dim")
        return init_cache(
            self._layer(in_features),
            batch_size,
            max_length=max_length,
            max_trim=max_trim,
            dtype=dtype or self.dtype or self.param_dtype,
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
        """The output of a call and the cache that `decode` goes on with, as the NNX module's.

        ``y, cache = module.apply(variables, x, method="prefill")``
        """
        x = _checks.as_array("x", x)
        layer, parts = self._layer_and_parts(x)
        context, cache = prefill(
            layer,
            parts.project(x),
            parts.learned,
            segment_ids=segment_ids,
            positions=positions,
            max_length=max_length,
            max_trim=max_trim,
            relative_positions=relative_positions,
        )
        return parts.out(context), cache

    def decode(
        self,
        x: Float[AnyArray, "B T E"],
        cache: Cache,
        *,
        valid: Bool[AnyArray, "B T"] | None = None,
        positions: Int[AnyArray, "B T"] | None = None,
        shared_kv: SharedKeysValues | None = None,
    ) -> tuple[Float[Array, "B T out_features"], Cache]:
        """Attends from the next tokens of each row, as the NNX module does.

        ``y, cache = module.apply(variables, x, cache, method="decode")``
        """
        x = _checks.as_array("x", x)
        layer, parts = self._layer_and_parts(x)
        context, cache = decode(
            layer,
            parts.project(x),
            parts.learned,
            cache,
            valid=valid,
            positions=positions,
            shared_kv=shared_kv,
        )
        return parts.out(context), cache

    @nn.nowrap
    def _layer(self, in_features: int) -> AttentionLayer:
        """The settings, with the features of x where none are given."""
        names = [field.name for field in dataclasses.fields(AttentionLayer)]
        given = {name: getattr(self, name) for name in names}
        return AttentionLayer.create(given | {"in_features": in_features})

    @nn.nowrap
    def _layer_and_parts(self, x: Shaped[Array, "..."]) -> tuple[AttentionLayer, _Parts]:
        layer = self._layer(x.shape[-1] if self.in_features is None else self.in_features)
        layer.check_input(x)
        return layer, self._parts(layer, x)

    @nn.compact
    def _parts(self, layer: AttentionLayer, x: Float[Array, "B S E"]) -> _Parts:
        """Submodules and parameters; the only method that makes any."""
        dense = functools.partial(
            nn.DenseGeneral,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        project = functools.partial(
            dense,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            promote_dtype=self.qkv_promote_dtype,
            dot_general=_dot_general(x, functools.partial(layer.sharding_of_heads, x)),
        )
        query_shape, key_shape = layer.norm_shapes
        sinks_shape = (layer.num_heads,) if self.learned_sinks else None
        return _Parts(
            projections=[
                None
                if shape is None
                else project(shape, name=name, use_bias=self.use_bias and name != "gate")
                for name, shape in layer.projections.items()
            ],
            out=dense(
                layer.out_features,
                axis=(-2, -1),
                use_bias=self.use_bias if self.use_out_bias is None else self.use_out_bias,
                kernel_init=self.out_kernel_init or self.kernel_init,
                bias_init=self.out_bias_init or self.bias_init,
                promote_dtype=self.out_promote_dtype,
                dot_general=_dot_general(x, lambda _: layer.sharding_of_output(x)),
                name="out",
            ),
            learned=Learned(
                self._param("query_norm", self.qk_norm_init, query_shape),
                self._param("key_norm", self.qk_norm_init, key_shape),
                self._param("sink_logits", self.sink_logits_init, sinks_shape),
            ),
        )

    @nn.nowrap
    def _param(self, name: str, init: Initializer, shape) -> Float[Array, "..."] | None:
        if shape is None:
            return None
        # A restored checkpoint may hold NumPy arrays.
        return jnp.asarray(self.param(name, init, shape, self.param_dtype))


def _dot_general(x: Array, sharding_of: Callable[[Array], NamedSharding | None]):
    """On Explicit axes a dot_general whose result lies as told of the kernel; else the default."""
    if not explicit_axes(x):
        return None

    def dot_general(inputs, kernel, dimensions, precision=None):
        out_sharding = sharding_of(kernel)
        return lax.dot_general(
            inputs, kernel, dimensions, precision=precision, out_sharding=out_sharding
        )

    return dot_general
