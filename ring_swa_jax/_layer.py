"""What the Flax modules share: an attention layer's settings, and its maths between projections."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from pallas_kernels import accumulator_dtype
from ring_swa_jax import _checks
from ring_swa_jax._axis import AxisName, explicit_axes, mesh_of, names_of, spec_of
from ring_swa_jax._integers import as_positions, as_segment_ids
from ring_swa_jax._rope import Rope, apply_rope
from ring_swa_jax._segments import segment_positions
from ring_swa_jax._sharded import only, ring_attention


class Learned(NamedTuple):
    """What a layer learns besides its projections, each None where it does not."""

    query_norm: Float[Array, "H"] | Float[Array, "N H"] | None
    key_norm: Float[Array, "H"] | Float[Array, "K H"] | None
    sink_logits: Float[Array, "N"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """Settings of one layer, checked; the modules' docstrings say what they mean."""

    num_heads: int
    in_features: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    out_features: int
    window_size: int | None
    num_sink_tokens: int
    learned_sinks: bool
    logits_soft_cap: float | None
    scale: float | None
    qk_norm: bool | str
    qk_norm_epsilon: float
    rope: Rope | None
    mesh: Mesh | AbstractMesh | None
    seq_axis: AxisName | None
    batch_axis: AxisName | None
    head_axis: AxisName | None
    implementation: str | None

    @classmethod
    def create(
        cls,
        *,
        num_heads: int,
        in_features: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        value_dim: int | None,
        out_features: int | None,
        **settings: Any,
    ) -> "AttentionLayer":
        """Fills in the sizes that are None.

        Raises:
            ValueError: sizes or settings that do not fit.
            TypeError: settings of another type.
        """
        if head_dim is None:
            if num_heads < 1 or in_features % num_heads:
                raise ValueError(
                    f"num_heads={num_heads} does not divide in_features={in_features}; "
                    "give head_dim"
                )
            head_dim = in_features // num_heads
        return cls(
            num_heads=num_heads,
            in_features=in_features,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            value_dim=head_dim if value_dim is None else value_dim,
            out_features=in_features if out_features is None else out_features,
            **settings,
        )

    def __post_init__(self):
        for name in ("num_heads", "in_features", "num_kv_heads", "head_dim", "value_dim",
                     "out_features"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        _checks.static_window(self.window_size)
        _checks.static_sinks(self.num_sink_tokens)
        _checks.static_soft_cap(self.logits_soft_cap)
        _checks.static_scale(self.scale, self.head_dim)
        if self.qk_norm not in (False, True, "all_heads"):
            raise ValueError(f'qk_norm must be False, True or "all_heads", got {self.qk_norm!r}')
        self._check_rope()

    def _check_rope(self):
        if self.rope is None:
            return
        if not isinstance(self.rope, Rope):
            raise TypeError(f"rope must be a ring_swa_jax.Rope or None, got {self.rope!r}")
        if self.rope.rotary_dim is None and self.head_dim % 2:
            raise ValueError(
                f"rope turns pairs of features, but head_dim={self.head_dim} is odd; "
                "give Rope(rotary_dim=...) or rope=None"
            )
        if self.rope.rotary_dim is not None and self.rope.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rope.rotary_dim} is more than head_dim={self.head_dim}"
            )

    @property
    def norm_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the factors that the norms of q and of k learn."""
        if self.qk_norm == "all_heads":
            return (self.num_heads, self.head_dim), (self.num_kv_heads, self.head_dim)
        return (self.head_dim,), (self.head_dim,)

    def check_input(self, x) -> Array:
        """``x`` as an array [B, S, features].

        Raises:
            ValueError: another shape.
            TypeError: no array.
        """
        x = _checks.as_array("x", x)
        if x.ndim != 3 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must have the shape [B, S, {self.in_features}] of in_features, got {x.shape}"
            )
        return x

    def forward(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        learned: Learned,
        *,
        segment_ids: Int[Array, "B S"] | None,
        positions: Int[Array, "B S"] | None,
    ) -> Float[Array, "B S N Hv"]:
        """From the projections of whole rows to the attended values."""
        if segment_ids is not None:
            segment_ids = as_segment_ids(segment_ids, q.shape[:2])
        q, k = self.normalise(q, k, learned)
        positions = self.positions(q, segment_ids, positions)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        return self.attend(q, k, v, segment_ids, learned.sink_logits)

    def normalise(
        self, q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], learned: Learned
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S K H"]]:
        """Queries and keys after their norms, where the layer has any."""
        if learned.query_norm is None or learned.key_norm is None:
            return q, k
        return self._normalise(q, learned.query_norm), self._normalise(k, learned.key_norm)

    def rotate(
        self, x: Float[Array, "B S N H"], positions: Int[Array, "B S"]
    ) -> Float[Array, "B S N H"]:
        """Queries or keys, turned by their positions where the layer does that."""
        return x if self.rope is None else apply_rope(x, positions, **vars(self.rope))

    def _normalise(self, x: Float[Array, "B S N H"], factor: Array) -> Float[Array, "B S N H"]:
        """RMSNorm over each head, or over all heads of a token together, in float32."""
        wide = x.astype(accumulator_dtype(x.dtype))
        axes = (-2, -1) if self.qk_norm == "all_heads" else -1
        square = jnp.mean(wide * wide, axis=axes, keepdims=True)
        factor = jnp.expand_dims(factor, range(x.ndim - factor.ndim)).astype(wide.dtype)
        return (wide * jax.lax.rsqrt(square + self.qk_norm_epsilon) * factor).astype(x.dtype)

    def positions(
        self,
        x: Array,
        segment_ids: Int[Array, "B S"] | None,
        positions: Int[Array, "B S"] | None,
    ) -> Int[Array, "B S"] | Int[Array, "1 S"]:
        """By default positions restart in each document, or count through without documents."""
        if positions is not None:
            return as_positions(positions)
        if segment_ids is None:
            return jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        return segment_positions(segment_ids)

    def sharding_of_heads(self, x: Array, kernel: Array) -> NamedSharding | None:
        """How x @ kernel [E, heads, H] is to lie on Explicit mesh axes; None on others.

        Heads that the devices do not divide are not cut: `ring_attention` repeats them.
        """
        explicit = explicit_axes(x)
        if not explicit:
            return None
        batch, seq, _ = spec_of(x)
        mesh = mesh_of(x)
        spec = only(PartitionSpec(batch, seq, self.head_axis or spec_of(kernel)[1]), explicit)
        devices = math.prod(mesh.shape[name] for name in names_of(spec[2]))
        spec = spec if kernel.shape[1] % devices == 0 else spec[:2]
        return NamedSharding(mesh, PartitionSpec(*spec))

    def sharding_of_output(self, x: Array) -> NamedSharding | None:
        """How the layer's output is to lie on Explicit mesh axes, as x does; None on others."""
        explicit = explicit_axes(x)
        if not explicit:
            return None
        return NamedSharding(mesh_of(x), only(PartitionSpec(*spec_of(x)), explicit))

    def attend(
        self,
        q: Float[Array, "B S N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        segment_ids: Int[Array, "B S"] | None,
        sink_logits: Float[Array, "N"] | None,
    ) -> Float[Array, "B S N Hv"]:
        """The attention itself."""
        return ring_attention(
            q,
            k,
            v,
            window_size=self.window_size,
            num_sink_tokens=self.num_sink_tokens,
            segment_ids=segment_ids,
            sink_logits=sink_logits,
            logits_soft_cap=self.logits_soft_cap,
            scale=self.scale,
            mesh=self.mesh,
            seq_axis=self.seq_axis,
            batch_axis=self.batch_axis,
            head_axis=self.head_axis,
            implementation=self.implementation,
        )
