"""Attention to the keys that windows reach: exchange="halo".

What moves between devices are the keys before a chunk, those after it where windows reach there,
and the sinks of the sequence that the chunk begins in.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

import pallas_kernels
from pallas_kernels import SinkRun, Spec, accumulator_dtype
from ring_swa_jax import _axis
from ring_swa_jax._axis import SequenceAxis, same_varying
from ring_swa_jax._layout import in_order_of_tokens
from ring_swa_jax._segments import Bounds, bounds_of, without_padding


@dataclasses.dataclass(frozen=True)
class RingHalo:
    """The ``min(W, (devices - 1) * T)`` keys before or after a chunk of T, each hop one permute.

    Hop c comes straight from the device c + 1 chunks away, and only the keys that a window
    reaches travel, keys and values in one message. A device with no device that far away receives
    zeros, which no query sees: their positions lie outside the sequence.

    Attributes:
        axis: mesh axis that cuts the sequence.
        lengths: keys of each hop.
        is_after: whether the keys are after the chunk.
    """

    axis: SequenceAxis
    lengths: tuple[int, ...]
    is_after: bool = False

    @classmethod
    def of_window(
        cls, axis: SequenceAxis, chunk: int, window: int | None, *, is_after: bool = False
    ) -> "RingHalo":
        """The halo of W keys on a side, None for all keys."""
        reach = (axis.size - 1) * chunk
        reach = reach if window is None else min(window, reach)
        lengths = tuple(min(chunk, reach - begin) for begin in range(0, reach, chunk))
        return cls(axis, lengths, is_after)

    def fetch(
        self,
        hop: int,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"],
        start: Int[Array, ""] | Int[Array, "B T"],
        *,
        after: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """The nearest ``lengths[hop]`` keys and values of the device ``hop + 1`` chunks away.

        Padding, where ``start`` is behind the token, travels as zeros. The message is made only
        when ``after`` is known.
        """
        length = self.lengths[hop]
        begin = 0 if self.is_after else key.shape[1] - length
        key, value = key[:, begin : begin + length], value[:, begin : begin + length]
        if start.ndim:
            start = start[:, begin : begin + length]
            key, value = (without_padding(x, start, begin) for x in (key, value))
        return self._send(key, value, self._pairs(hop), after)

    def give_back(
        self, hop: int, dkey: Float[Array, "B S K H"], dvalue: Float[Array, "B S K Hv"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """Sends the gradients of ``fetch``'s result to where it came from."""
        return self._send(dkey, dvalue, [(dst, src) for src, dst in self._pairs(hop)])

    def _pairs(self, hop: int) -> list[tuple[int, int]]:
        """(sending device, receiving device) of a hop's messages."""
        chunks = range(self.axis.size - hop - 1)
        if self.is_after:
            return [(r + hop + 1, r) for r in chunks]
        return [(r, r + hop + 1) for r in chunks]

    def _send(
        self,
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K Hv"],
        pairs: list[tuple[int, int]],
        after: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        message = _axis.after(jnp.concatenate([key, value], axis=-1), after)
        message = lax.ppermute(message, self.axis.name, pairs)
        return message[..., : key.shape[-1]], message[..., key.shape[-1] :]


def fetch_sinks(
    axis: SequenceAxis,
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    bounds: Bounds,
    num_sinks: int,
) -> SinkRun:
    """The first tokens of the sequence that crosses into each chunk, in one reduce-scatter.

    A device offers the sinks of the sequence that it ends in to all later devices which begin in
    that sequence; where the sinks straddle two devices, each offers its part. A sum of one row
    and zeros is exact, and the gradient returns in float32.
    """
    chunk = key.shape[1]
    index = axis.index()
    dtype = accumulator_dtype(key.dtype)
    start_of_last = bounds.start_of_last()
    slots = start_of_last[:, None] + jnp.arange(num_sinks, dtype=jnp.int32)[None]
    held = ((slots >= 0) & (slots < chunk))[..., None, None]
    rows = jnp.clip(slots, 0, chunk - 1)[..., None, None]
    both = jnp.concatenate([key, value], axis=-1)
    offer = jnp.where(held, jnp.take_along_axis(both, rows, axis=1).astype(dtype), 0)
    wanted = bounds.crossing == (start_of_last + index * chunk)[None]
    wanted &= (jnp.arange(axis.size, dtype=jnp.int32) > index)[:, None]
    offers = jnp.where(wanted[..., None, None, None], offer[None], 0)
    sinks = lax.psum_scatter(offers, axis.name, scatter_dimension=0)
    return SinkRun(sinks[..., : key.shape[-1]], sinks[..., key.shape[-1] :])


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    sink_logits: Float[Array, "N"] | None,
    cu_seqlens: Int[Array, "n"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    axis: SequenceAxis,
    layout: str,
    spec: Spec,
    implementation: str | None,
) -> Float[Array, "B T N Hv"]:
    """Attention of a chunk; half chunks in another layout are first put in the order of tokens."""
    chunk = q.shape[1]
    name = pallas_kernels.choose(implementation, spec, q, v)
    bounds = bounds_of(axis, chunk, cu_seqlens, segment_ids, ends=spec.lookahead > 0)
    q, k, v, sink_logits, bounds = same_varying(axis, q, k, v, sink_logits, bounds)

    def attend_in_order(q, k, v):
        sinks = None
        if spec.num_sinks and axis.size > 1:
            sinks = fetch_sinks(axis, k, v, bounds, spec.num_sinks)
        arrays = (q, k, v, sinks, sink_logits, bounds.start)
        if not spec.lookahead:
            halo = RingHalo.of_window(axis, chunk, spec.window)
            return pallas_kernels.attend(spec, halo, name, *arrays)
        sides = pallas_kernels.Sides(
            RingHalo.of_window(axis, chunk, spec.keys_before),
            RingHalo.of_window(axis, chunk, spec.lookahead, is_after=True),
        )
        return pallas_kernels.attend_both_sides(spec, sides, name, *arrays, bounds.end)

    return in_order_of_tokens(attend_in_order, axis, layout, q, k, v)
