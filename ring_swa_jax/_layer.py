"""What the Flax modules share: the maths of an attention layer between its projections."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from pallas_kernels import accumulator_dtype
from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import explicit_axes, mesh_of, names_of, spec_of
from ring_swa_jax._chunks import chunk_segment_ids
from ring_swa_jax._integers import as_positions, as_segment_ids
from ring_swa_jax._layer_settings import ACTIVATIONS, LayerSettings
from ring_swa_jax._layout import check_halves, to_dual_order
from ring_swa_jax._mesh_axes import sequence_devices
from ring_swa_jax._rope import apply_rope
from ring_swa_jax._segments import dual_chunk_positions, segment_positions
from ring_swa_jax._sharded import only, ring_attention


class Projected(NamedTuple):
    """The projections of x, neither normalised nor rotated; None where the layer has none."""

    query: Float[Array, "B S N H"]
    key: Float[Array, "B S K H"] | None
    value: Float[Array, "B S K Hv"] | None
    gate: Float[Array, "B S N 1"] | Float[Array, "B S N Hv"] | None


class KeysValues(NamedTuple):
    """Keys and values as the attention takes them; a later layer may take the same."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]


# `KeysValues`, of which Linen makes a plain tuple on the way into a method.
SharedKeysValues = tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]


class Learned(NamedTuple):
    """The parameters of a layer besides its projections; None for those that it has not."""

    query_norm: Float[Array, "H"] | Float[Array, "N H"] | None
    key_norm: Float[Array, "H"] | Float[Array, "K H"] | None
    sink_logits: Float[Array, "N"] | None


class AttentionLayer(LayerSettings):
    """The maths of a layer with these settings."""

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
        projected: Projected,
        learned: Learned,
        *,
        segment_ids: Int[AnyArray, "B S"] | None,
        positions: Int[AnyArray, "B S"] | None,
        shared_kv: SharedKeysValues | None,
    ) -> Float[Array, "B S N Hv"]:
        """From the projections of whole rows to what the output projects."""
        if segment_ids is not None:
            segment_ids = as_segment_ids(segment_ids, projected.query.shape[:2])
        positions = self.positions(projected.query, segment_ids, positions)
        q = self.queries(projected.query, learned, positions)
        kv = self.keys_values(projected, learned, positions, shared_kv)
        context = self.attend(q, kv.key, kv.value, segment_ids, learned.sink_logits)
        return self.gated(context, projected.gate)

    def queries(
        self,
        x: Float[Array, "B S N H"],
        learned: Learned,
        positions: Int[Array, "#B S"] | None,
    ) -> Float[Array, "B S N H"]:
        """Queries as they meet the keys; without positions they are not rotated."""
        x = self._normed_and_rotated(x, learned.query_norm, positions)
        if self.query_scaling is None or positions is None:
            return x
        return self.query_scaling.scale(x, positions)

    def keys_values(
        self,
        projected: Projected,
        learned: Learned,
        positions: Int[Array, "#B S"] | None,
        shared_kv: SharedKeysValues | None = None,
    ) -> KeysValues:
        """Keys and values as they meet the queries; without positions keys are not rotated.

        Raises:
            ValueError: those of another layer, where the layer has its own, or none where not.
        """
        if self.kv_shared != (shared_kv is not None):
            raise ValueError(
                "a layer with kv_shared=True, and no other, takes the keys and values of an "
                "earlier layer, shared_kv=..., from that layer's keys_values(x, ...); got "
                f"kv_shared={self.kv_shared} and "
                f"shared_kv={None if shared_kv is None else 'keys and values'}"
            )
        if shared_kv is not None:
            return KeysValues(*shared_kv)
        key = projected.key
        value = key if self.key_as_value else projected.value
        assert key is not None and value is not None  # as this layer has its own
        if self.value_norm:
            value = self._rms_norm(value)
        return KeysValues(self._normed_and_rotated(key, learned.key_norm, positions), value)

    def gated(
        self,
        context: Float[Array, "B S N Hv"],
        gate: Float[Array, "B S N 1"] | Float[Array, "B S N Hv"] | None,
    ) -> Float[Array, "B S N Hv"]:
        """The attended values, normalised and gated where the layer does that."""
        if self.context_norm:
            context = self._rms_norm(context)
        if gate is None:
            return context
        activation = ACTIVATIONS[self.output_gate_activation]
        wide = accumulator_dtype(context.dtype)
        return (context.astype(wide) * activation(gate.astype(wide))).astype(context.dtype)

    def _normed_and_rotated(
        self,
        x: Float[Array, "B S N H"],
        factor: Float[Array, "H"] | Float[Array, "N H"] | None,
        positions: Int[Array, "#B S"] | None,
    ) -> Float[Array, "B S N H"]:
        """Norm and rotation, in the layer's order."""
        if self.qk_norm and not self.qk_norm_after_rope:
            x = self._rms_norm(x, factor, all_heads=self.qk_norm == "all_heads")
        if positions is not None:
            x = self.rotate(x, positions)
        if self.qk_norm and self.qk_norm_after_rope:
            x = self._rms_norm(x, factor, all_heads=self.qk_norm == "all_heads")
        return x

    def rotate(
        self, x: Float[Array, "B S N H"], positions: Int[Array, "#B S"]
    ) -> Float[Array, "B S N H"]:
        """Queries or keys, rotated by their positions where the layer does that."""
        return x if self.rope is None else apply_rope(x, positions, **vars(self.rope))

    def _rms_norm(
        self,
        x: Float[Array, "B S N H"],
        factor: Float[Array, "H"] | Float[Array, "N H"] | None = None,
        *,
        all_heads: bool = False,
    ) -> Float[Array, "B S N H"]:
        """RMSNorm over each head, or over all heads of a token together, in float32."""
        wide = x.astype(accumulator_dtype(x.dtype))
        square = jnp.mean(wide * wide, axis=(-2, -1) if all_heads else -1, keepdims=True)
        normal = wide * jax.lax.rsqrt(square + self.qk_norm_epsilon)
        if factor is not None:
            factor = jnp.expand_dims(factor, range(x.ndim - factor.ndim)).astype(wide.dtype)
            normal = normal * factor
        return normal.astype(x.dtype)

    def positions(
        self,
        x: Float[Array, "B S N H"],
        segment_ids: Int[AnyArray, "B S"] | None,
        positions: Int[AnyArray, "B S"] | None,
    ) -> Int[Array, "#B S"]:
        """By default positions restart in each document, or count through without documents."""
        if positions is not None:
            return as_positions(positions)
        devices = self.dual_chunk_devices(x)
        if segment_ids is None:
            count = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            return count if devices == 1 else to_dual_order(count, devices)
        if devices == 1:
            return segment_positions(segment_ids)
        return dual_chunk_positions(segment_ids, devices)

    def dual_chunk_devices(self, q: Float[Array, "B S N H"]) -> int:
        """Over how many devices the tokens are in dual-chunk order; 1: they are in their own."""
        if self.layout != "dual_chunk":
            return 1
        axes = (self.seq_axis, self.batch_axis, self.head_axis)
        devices = sequence_devices(q, self.mesh, *axes)
        check_halves(self.layout, q.shape[1], devices)
        return devices

    def sharding_of_heads(self, x: Array, kernel: AnyArray) -> NamedSharding | None:
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
        segment_ids: Int[AnyArray, "B S"] | None,
        sink_logits: Float[Array, "N"] | None,
    ) -> Float[Array, "B S N Hv"]:
        """The attention itself, of documents or of their chunks."""
        if self.attention_chunk_size is not None:
            if segment_ids is None:
                segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
            segment_ids = chunk_segment_ids(segment_ids, self.attention_chunk_size)
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
            layout=self.layout,
            exchange=self.exchange,
            implementation=self.implementation,
        )
