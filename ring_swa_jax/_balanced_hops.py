"""Which half chunks a device has, and which keys of each hop of a balanced ring it sees.

Device r computes the queries of the half chunks r and 2P - 1 - r. When it has the keys of another
device d, it computes two blocks of half a chunk by half a chunk:

* The second half of the queries sees the first half of the keys, whatever d is.
* Where d < r, the first half of the queries sees the first half of the keys.
* Where d > r, the second half of the queries sees the second half of the keys.

One program computes both cases: it shifts the keys so that the visible ones are the last, and the
``start`` of each query says how many of the last keys the query sees.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from pallas_kernels import KeyRun
from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._layout import HalfChunks


class Halves(NamedTuple):
    """One array for each of the two half chunks of a device."""

    first: Array
    second: Array


class Launch(NamedTuple):
    """The keys that one half of the queries attends in a launch, and each query's first key."""

    half: int
    run: KeyRun
    start: Int[Array, "B half"]


@dataclasses.dataclass(frozen=True)
class BalancedRing:
    """The hops of a ring of P chunks, and which keys of each hop this device sees.

    A device's array holds its two half chunks one after the other. Keys and values are one array,
    and so are their gradients, so that a hop is one message. Where a chunk's length is odd, half
    chunks with even numbers are one token longer, and `split` pads the shorter half chunk with a
    row of zeros.
    """

    axis: SequenceAxis
    layout: str
    chunk: int
    dim: int

    @property
    def halves(self) -> HalfChunks:
        """The half chunks."""
        return HalfChunks(self.axis, self.chunk)

    def to_half_chunks(self, x: Array, axis: int = 1) -> Array:
        """The caller's array as half chunks."""
        return x if self.layout == "dual_chunk" else self.halves.to_dual_chunks(x, axis)

    def from_half_chunks(self, x: Array, axis: int = 1) -> Array:
        """The inverse of `to_half_chunks`."""
        return x if self.layout == "dual_chunk" else self.halves.from_dual_chunks(x, axis)

    def split(self, x: Array, axis: int = 1) -> Halves:
        """The two half chunks, the shorter one padded to the length of the longer one."""
        half = self.halves.longest
        if self.chunk % 2 == 0:
            return Halves(*jnp.split(x, 2, axis))
        length = self._first_length()
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, 1)
        second = lax.dynamic_slice_in_dim(jnp.pad(x, pad), length, half, axis)
        first = lax.slice_in_dim(x, 0, half, axis=axis)
        shape = [1] * x.ndim
        shape[axis] = half
        own = jnp.arange(half, dtype=jnp.int32).reshape(shape) < length
        return Halves(jnp.where(own, first, jnp.zeros_like(first)), second)

    def join(self, halves: Halves, axis: int = 1) -> Array:
        """The inverse of `split`."""
        if self.chunk % 2 == 0:
            return jnp.concatenate(halves, axis)
        pad = [(0, 0)] * halves.first.ndim
        pad[axis] = (0, self.halves.longest)
        whole = jnp.pad(halves.first, pad)
        whole = lax.dynamic_update_slice_in_dim(whole, halves.second, self._first_length(), axis)
        return lax.slice_in_dim(whole, 0, self.chunk, axis=axis)

    def starts(self, start: Int[Array, ""] | Int[Array, "B S"], batch: int) -> Halves:
        """For each query the position, in the whole sequence, where its document starts."""
        halves, found = self.halves, []
        for half in halves.of_device(self.axis.index()):
            rows = jnp.arange(halves.longest, dtype=jnp.int32)
            if start.ndim:
                past = jnp.pad(start, ((0, 0), (0, 1)))
                own = lax.dynamic_slice_in_dim(past, halves.begin(half), halves.longest, 1)
            else:
                own = jnp.broadcast_to(start, (batch, halves.longest))
            # The row that `split` adds starts after all keys, as padding does.
            filled = rows >= halves.length(half)
            past_all = self.axis.size * self.chunk
            found.append(jnp.where(filled[None], past_all, own))
        return Halves(*found)

    def without_padding(self, x: Float[Array, "B T R D"], starts: Halves) -> Array:
        """``x`` with zeros at this device's padding, which other devices do not know of."""
        rows = jnp.arange(self.halves.longest, dtype=jnp.int32)[None]
        numbers = self.halves.of_device(self.axis.index())
        real = [
            start <= self.halves.begin(number) + rows
            for start, number in zip(starts, numbers, strict=True)
        ]
        return jnp.where(self.join(Halves(*real))[..., None, None], x, jnp.zeros_like(x))

    def own_launches(self, keys: Array, starts: Halves) -> list[Launch]:
        """Each half of the queries to its own keys; the second half also to the first half's."""
        numbers = self.halves.of_device(self.axis.index())
        launches = [
            Launch(n, self._run(part, 0), start - self.halves.begin(number))
            for n, (part, start, number) in enumerate(
                zip(self.split(keys), starts, numbers, strict=True)
            )
        ]
        return [*launches, self.hop_launches(0, keys, starts)[1]]

    def hop_launches(
        self, distance: Int[Array, ""] | int, keys: Array, starts: Halves
    ) -> tuple[Launch, Launch]:
        """Each half of the queries to the keys of the device ``distance`` places before."""
        index, halves = self.axis.index(), self.halves
        device = (index - distance) % self.axis.size
        begins = [halves.begin(half) for half in halves.of_device(device)]
        lengths = [halves.length(half) for half in halves.of_device(device)]

        def begin_from_end(start, n):
            """The first key that a query sees in half chunk n, counted from the half's end."""
            return jnp.clip(start - begins[n], 0, lengths[n]) - lengths[n]

        first = jnp.where(device < index, begin_from_end(starts.first, 0), 0)
        second = begin_from_end(starts.second, 0)
        both = second + begin_from_end(starts.second, 1)
        second = jnp.where(device > index, both, second)
        run = self._run(self._shifted(keys, self._shift(distance)), -self.chunk)
        return Launch(0, run, first), Launch(1, run, second)

    def shifted_back(self, x: Array, distance: Int[Array, ""] | int) -> Array:
        """Gradients of the shifted keys of `hop_launches`, in the order before the shift."""
        return self._shifted(x, self.chunk - self._shift(distance))

    def _run(self, keys: Array, offset: int) -> KeyRun:
        return KeyRun(keys[..., : self.dim], keys[..., self.dim :], offset)

    def _shift(self, distance: Int[Array, ""] | int) -> Int[Array, ""]:
        """How far a device's keys are shifted, so that the visible keys are the last."""
        device = (self.axis.index() - distance) % self.axis.size
        return jnp.where(device > self.axis.index(), 0, self.halves.length(device))

    def _shifted(self, x: Array, shift: Int[Array, ""]) -> Array:
        """``x`` with its first ``shift`` tokens moved to the end."""
        return lax.dynamic_slice_in_dim(jnp.concatenate([x, x], 1), shift, self.chunk, 1)

    def _first_length(self) -> Int[Array, ""]:
        return self.halves.length(self.axis.index())
