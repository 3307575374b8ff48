"""What moves between devices: the keys before a chunk, and the sinks of the sequence it is in."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels import SinkRun, accumulator_dtype
from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._segments import Bounds


@dataclasses.dataclass(frozen=True)
class RingHalo:
    """The ``min(W, (devices - 1) * T)`` keys before a chunk of T, each hop one permute.

    Hop c comes straight from the device c + 1 chunks before, and only the keys that a window
    reaches travel, keys and values in one message. A device with nobody that far before it
    receives zeros, which no query sees: their positions lie before the sequence.
    """

    axis: SequenceAxis
    lengths: tuple[int, ...]

    @classmethod
    def of_window(cls, axis: SequenceAxis, chunk: int, window: int | None) -> "RingHalo":
        """The halo of a window, None for all keys."""
        reach = (axis.size - 1) * chunk
        reach = reach if window is None else min(window, reach)
        return cls(axis, tuple(min(chunk, reach - begin) for begin in range(0, reach, chunk)))

    def fetch(
        self,
        hop: int,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"],
        *,
        after: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """The last ``lengths[hop]`` keys and values of the device ``hop + 1`` chunks before.

        With ``after`` the message is not made before that number is known. An optimization
        barrier would not do: compilers drop it before they order the program.
        """
        begin = key.shape[1] - self.lengths[hop]
        pairs = [(r, r + hop + 1) for r in range(self.axis.size - hop - 1)]
        return self._send(key[:, begin:], value[:, begin:], pairs, after)

    def give_back(
        self, hop: int, dkey: Float[Array, "B S K H"], dvalue: Float[Array, "B S K Hv"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """Sends the gradients of ``fetch``'s result to where it came from."""
        pairs = [(r + hop + 1, r) for r in range(self.axis.size - hop - 1)]
        return self._send(dkey, dvalue, pairs)

    def _send(
        self,
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K Hv"],
        pairs: list[tuple[int, int]],
        after: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        message = jnp.concatenate([key, value], axis=-1)
        if after is not None:
            is_number = after == after  # True, but no compiler may assume it
            message = jnp.where(is_number, message, 0)
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
