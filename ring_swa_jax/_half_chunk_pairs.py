"""The pairs of half chunks that devices have in a balanced ring.

Of the 2P half chunks of a causal sequence a device has the pair n and 2P - 1 - n, so that all
devices attend equally many keys. Within the caller's own chunk a device attends without any
exchange, so no hop of the ring repeats that.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int, Shaped

from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._layout import HalfChunks


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pair of half chunks of each device, and the message that brings it.

    Of contiguous chunks a device keeps the first half. It swaps the second half with its mirror
    image, the device P - 1 - r. Chunks in dual-chunk order are pairs already.

    Attributes:
        axis: mesh axis that cuts the sequence.
        layout: order of the tokens in the caller's arrays.
        chunk: tokens on a device. Of an odd number, the first half chunk is the longer one.
    """

    axis: SequenceAxis
    layout: str
    chunk: int

    @property
    def halves(self) -> HalfChunks:
        """The half chunks."""
        return HalfChunks(self.axis, self.chunk)

    @property
    def first_hop(self) -> int:
        """Where the caller's chunk is a pair, its own keys are no hop."""
        return 1 if self.layout == "dual_chunk" else 0

    def numbers(self, device: Int[Array, ""] | int) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """(upper, lower): the half chunks of a device."""
        first = device if self.layout == "dual_chunk" else 2 * device
        second = 2 * self.axis.size - 1 - first
        return jnp.maximum(first, second), jnp.minimum(first, second)

    def of_chunk(self, device: Array) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The half chunks in a device's part of the caller's array, in their order."""
        if self.layout == "dual_chunk":
            return self.halves.of_device(device)
        return 2 * device, 2 * device + 1

    def sees(
        self, query: Int[Array, ""] | int, key: Int[Array, ""] | int
    ) -> Bool[Array, ""] | bool:
        """Whether the queries of a half chunk see the keys of another one in a hop."""
        return (key < query) & (self._chunk_of(key) != self._chunk_of(query))

    def starts_in_chunk(
        self, start: Int[Array, ""] | Int[Array, "B S"]
    ) -> Int[Array, ""] | Int[Array, "B T"]:
        """The first of the chunk's own keys that each of its queries may see, in their order."""
        if not start.ndim:
            return jnp.zeros_like(start)
        longest = self.halves.longest
        lengths = longest, self.chunk - longest
        begins = [self.halves.begin(half) for half in self.of_chunk(self.axis.index())]
        own = jnp.concatenate(
            [
                lax.dynamic_slice_in_dim(start, begin, length, 1)
                for begin, length in zip(begins, lengths, strict=True)
            ],
            1,
        )
        before = [
            jnp.clip(own - begin, 0, length) for begin, length in zip(begins, lengths, strict=True)
        ]
        return before[0] + before[1]

    def swap(self, arrays: list[Shaped[Array, "B T *_"]]) -> tuple[list[Array], Array]:
        """The caller's arrays, which have one dtype, as pairs; and an array that is sent.

        What depends on that array comes after the beginning of the message.
        """
        if self.layout == "dual_chunk":
            half = self.halves.longest
            swapped = [jnp.concatenate([x[:, half:], x[:, :half]], 1) for x in arrays]
            return swapped, swapped[-1]
        longest = self.halves.longest
        rest = self.chunk - longest
        flat = [x[:, longest:].reshape(x.shape[0], rest, math.prod(x.shape[2:])) for x in arrays]
        leaving = jnp.concatenate(flat, -1)
        arrived, found, begin = self._to_mirror(leaving), [], 0
        for x, sent in zip(arrays, flat, strict=True):
            part = lax.slice_in_dim(arrived, begin, begin + sent.shape[-1], axis=2)
            part = part.reshape(*sent.shape[:2], *x.shape[2:])
            kept = x[:, :longest]
            both = jnp.concatenate([part, kept, part], 1)
            first = jnp.where(self._keeps_lower, 0, part.shape[1])
            found.append(lax.dynamic_slice_in_dim(both, first, self.chunk, 1))
            begin += sent.shape[-1]
        return found, leaving

    def swap_back(self, x: Shaped[Array, "B T *_"], dtype) -> Shaped[Array, "B T *_"]:
        """The inverse of `swap`, of one array; what travels does so in ``dtype``."""
        longest = self.halves.longest
        if self.layout == "dual_chunk":
            return jnp.concatenate([x[:, longest:], x[:, :longest]], 1)
        rest = self.chunk - longest
        kept = lax.dynamic_slice_in_dim(x, jnp.where(self._keeps_lower, rest, 0), longest, 1)
        leaving = lax.dynamic_slice_in_dim(x, jnp.where(self._keeps_lower, 0, longest), rest, 1)
        arrived = self._to_mirror(leaving.astype(dtype)).astype(x.dtype)
        return jnp.concatenate([kept, arrived], 1)

    @property
    def _keeps_lower(self) -> Bool[Array, ""]:
        """Whether the half chunk that a device keeps is the lower one of its pair."""
        return 2 * self.axis.index() < self.axis.size

    def _chunk_of(self, half: Int[Array, ""] | int) -> Int[Array, ""] | int:
        """The device that has a half chunk in the caller's array."""
        if self.layout == "dual_chunk":
            return jnp.minimum(half, 2 * self.axis.size - 1 - half)
        return half // 2

    def _to_mirror(self, x: Array) -> Array:
        last = self.axis.size - 1
        return lax.ppermute(x, self.axis.name, [(n, last - n) for n in range(self.axis.size)])
