"""Which keys the new tokens of a decoding step see, and their softmax over all of them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import einops
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from pallas_kernels import accumulator_dtype
from ring_swa_jax._attend_chunk import matmul_precision
from ring_swa_jax._cache import Cache

Rotate = Callable[[Float[Array, "B S N H"], Int[Array, "B S"]], Float[Array, "B S N H"]]


class Run(NamedTuple):
    """Some of the keys, and the queries, rotated for these keys' positions."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B K _ H"]
    value: Float[Array, "B K _ Hv"]
    seen: Bool[Array, "B T _"]


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """The new tokens of each row.

    Attributes:
        query: their queries.
        positions: in the row's sequence.
        valid: False for padding.
        window: keys before a query that it sees; None: all.
        chunk: of the mask by chunks, or None.
        rotate: turns queries and keys where positions are relative to the cache, or None.
        last_index: the largest position relative to the cache.
        gap: what the window's positions relative to the cache fall behind those in the sequence.
    """

    query: Float[Array, "B T N H"]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    window: int | None
    chunk: int | None
    rotate: Rotate | None
    last_index: int
    gap: Int[Array, "B 1"] | int

    @classmethod
    def create(
        cls,
        query: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cache: Cache,
        window: int | None,
        num_sinks: int,
        chunk: int | None,
        rotate: Rotate | None,
    ) -> "NewTokens":
        """The next tokens of a cache, before it has them."""
        last_index = num_sinks + (window or 0)  # fits into int32, as the cache has so many slots
        gap = 0 if window is None else jnp.maximum(cache.length - last_index, 0)[:, None]
        return cls(query, positions, valid, window, chunk, rotate, last_index, gap)

    def in_window(
        self,
        key: Float[Array, "B K S H"],
        value: Float[Array, "B K S Hv"],
        key_positions: Int[Array, "B S"],
    ) -> Run:
        """Keys that are seen where the window holds them; an empty slot's position is negative."""
        distance = self.positions[:, :, None] - key_positions[:, None]
        seen = (distance >= 0) & (key_positions >= 0)[:, None] & self.valid[..., None]
        if self.window is not None:
            seen &= distance <= self.window
        if self.chunk is not None:
            seen &= distance <= (self.positions % self.chunk)[:, :, None]
        if self.rotate is None:
            return Run(self.query, key, value, seen)
        query = self.rotate(self.query, jnp.maximum(self.positions - self.gap, 0))
        key = _rotate_keys(self.rotate, key, jnp.maximum(key_positions - self.gap, 0))
        return Run(query, key, value, seen)

    def before_window(
        self, key: Float[Array, "B K P H"], value: Float[Array, "B K P Hv"], window: int
    ) -> Run:
        """The first keys of the sequence, seen by queries whose window no longer holds them."""
        batch, _, num_slots, _ = key.shape
        slots = jnp.arange(num_slots, dtype=jnp.int32)[None]
        slots = jnp.broadcast_to(slots, (batch, num_slots))
        distance = self.positions[:, :, None] - slots[:, None]
        seen = (distance > window) & self.valid[..., None]
        if self.rotate is None:
            return Run(self.query, key, value, seen)
        query = self.rotate(self.query, jnp.minimum(self.positions, self.last_index))
        return Run(query, _rotate_keys(self.rotate, key, slots), value, seen)


def _rotate_keys(
    rotate: Rotate, key: Float[Array, "B K S H"], positions: Int[Array, "B S"]
) -> Float[Array, "B K S H"]:
    return rotate(key.swapaxes(1, 2), positions).swapaxes(1, 2)


def attend_runs(
    runs: list[Run], sink_logits: Float[Array, "N"] | None, scale: float, cap: float | None
) -> Float[Array, "B T N Hv"]:
    """One softmax over all runs; zeros for a query that sees no key."""
    batch, length, heads, _ = runs[0].query.shape
    _, num_kv, _, value_dim = runs[0].value.shape
    dtype = accumulator_dtype(runs[0].query.dtype)
    precision = matmul_precision()

    def dot(equation, x, y):
        return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=dtype)

    def logits(run):
        grouped = einops.rearrange(run.query, "b t (k g) h -> b t k g h", k=num_kv)
        x = dot("btkgh,bksh->bkgts", grouped, run.key) * scale
        x = x if cap is None else cap * jnp.tanh(x / cap)
        return jnp.where(run.seen[:, None, None], x, -jnp.inf)

    all_logits = [logits(run) for run in runs]
    row_max = jnp.max(jnp.stack([x.max(-1) for x in all_logits]), axis=0)
    if sink_logits is not None:
        learned = sink_logits.astype(dtype).reshape(1, num_kv, -1, 1)
        row_max = jnp.maximum(row_max, learned)
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    row_sum = jnp.zeros_like(row_max) if sink_logits is None else jnp.exp(learned - row_max)
    out = jnp.zeros((batch, num_kv, heads // num_kv, length, value_dim), dtype)
    for run, x in zip(runs, all_logits, strict=True):
        weights = jnp.exp(x - row_max[..., None])
        row_sum += weights.sum(-1)
        out += dot("bkgts,bksv->bkgtv", weights.astype(run.value.dtype), run.value)
    out = out / jnp.where(row_sum == 0, 1, row_sum)[..., None]
    return einops.rearrange(out, "b k g t v -> b t (k g) v")
