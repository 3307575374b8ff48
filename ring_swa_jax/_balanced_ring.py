"""Ring attention without a window, with equal work on all devices: exchange="ring".

Device r computes the queries of the half chunks r and 2P - 1 - r. Each device's keys and values
visit all devices in P - 1 hops; the transfer of a hop overlaps with the launches of the hop before.
When device r has the keys of another device d, it computes two blocks of half a chunk by half a
chunk:

* The second half of the queries sees the first half of the keys, whatever d is.
* Where d < r, the first half of the queries sees the first half of the keys.
* Where d > r, the second half of the queries sees the second half of the keys.

One program computes both cases: it shifts the keys so that the visible ones are the last, and the
``start`` of each query says how many of the last keys the query sees.

The hops are a loop, so that the program does not grow with the number of devices. The keys in
flight take the memory of three chunks; gathered keys would take that of P. The partial results, and
the gradients of keys and values, which travel with their keys, keep the accumulator's precision.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pallas_kernels import (
    KeyRun,
    Spec,
    State,
    attend_keys,
    attend_keys_backward,
    choose,
    sink_logits_gradient,
)
from ring_swa_jax._axis import SequenceAxis, same_varying
from ring_swa_jax._layout import HalfChunks
from ring_swa_jax._segments import whole_bounds


class _Halves(NamedTuple):
    """One array for each of the two half chunks of a device."""

    first: Array
    second: Array


class _Launch(NamedTuple):
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

    def pass_on(self, x: Array) -> Array:
        """Sends ``x`` to the next device; returns the array of the device before."""
        size = self.axis.size
        pairs = [(device, (device + 1) % size) for device in range(size)]
        return lax.ppermute(x, self.axis.name, pairs)

    def split(self, x: Array, axis: int = 1) -> _Halves:
        """The two half chunks, the shorter one padded to the length of the longer one."""
        half = self.halves.longest
        if self.chunk % 2 == 0:
            return _Halves(*jnp.split(x, 2, axis))
        length = self._first_length()
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, 1)
        second = lax.dynamic_slice_in_dim(jnp.pad(x, pad), length, half, axis)
        first = lax.slice_in_dim(x, 0, half, axis=axis)
        shape = [1] * x.ndim
        shape[axis] = half
        own = jnp.arange(half, dtype=jnp.int32).reshape(shape) < length
        return _Halves(jnp.where(own, first, jnp.zeros_like(first)), second)

    def join(self, halves: _Halves, axis: int = 1) -> Array:
        """The inverse of `split`."""
        if self.chunk % 2 == 0:
            return jnp.concatenate(halves, axis)
        pad = [(0, 0)] * halves.first.ndim
        pad[axis] = (0, self.halves.longest)
        whole = jnp.pad(halves.first, pad)
        whole = lax.dynamic_update_slice_in_dim(whole, halves.second, self._first_length(), axis)
        return lax.slice_in_dim(whole, 0, self.chunk, axis=axis)

    def starts(self, start: Int[Array, ""] | Int[Array, "B S"], batch: int) -> _Halves:
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
        return _Halves(*found)

    def without_padding(self, x: Float[Array, "B T R D"], starts: _Halves) -> Array:
        """``x`` with zeros at this device's padding, which other devices do not know of."""
        rows = jnp.arange(self.halves.longest, dtype=jnp.int32)[None]
        numbers = self.halves.of_device(self.axis.index())
        real = [
            start <= self.halves.begin(number) + rows
            for start, number in zip(starts, numbers, strict=True)
        ]
        return jnp.where(self.join(_Halves(*real))[..., None, None], x, jnp.zeros_like(x))

    def own_launches(self, keys: Array, starts: _Halves) -> list[_Launch]:
        """Each half of the queries to its own keys; the second half also to the first half's."""
        numbers = self.halves.of_device(self.axis.index())
        launches = [
            _Launch(n, self._run(part, 0), start - self.halves.begin(number))
            for n, (part, start, number) in enumerate(
                zip(self.split(keys), starts, numbers, strict=True)
            )
        ]
        return [*launches, self.hop_launches(0, keys, starts)[1]]

    def hop_launches(
        self, distance: Int[Array, ""] | int, keys: Array, starts: _Halves
    ) -> tuple[_Launch, _Launch]:
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
        return _Launch(0, run, first), _Launch(1, run, second)

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
    """Attention of a chunk to all keys before its queries."""
    ring = BalancedRing(axis, layout, q.shape[1], q.shape[-1])
    half = slice(ring.halves.longest)
    name = choose(implementation, spec, q[:, half], v[:, half])
    start, _ = whole_bounds(axis, ring.chunk, cu_seqlens, segment_ids)
    q, k, v, sink_logits, start = same_varying(axis, q, k, v, sink_logits, start)
    return attend_ring(spec, ring, name, q, k, v, sink_logits, start)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend_ring(
    spec: Spec,
    ring: BalancedRing,
    implementation: str,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sink_logits: Float[Array, "N"] | None,
    start: Int[Array, ""] | Int[Array, "B S"],
) -> Float[Array, "B T N Hv"]:
    """Attention of a device's queries to all keys before them.

    Args:
        spec: static settings, without a window.
        ring: the hops.
        implementation: that of the kernels.
        query: queries of the device, in the caller's layout.
        key: keys of the device; N is a multiple of K.
        value: values of the device.
        sink_logits: learned sinks; all inputs vary over the same manual mesh axes.
        start: for each query of the whole sequence, in the order of the tokens, the position of
            the first token of the query's document.
    """
    arrays = (query, key, value, sink_logits, start)
    return _attend_ring_fwd(spec, ring, implementation, *arrays)[0]


def _attend_ring_fwd(spec, ring, implementation, query, key, value, sink_logits, start):
    query, keys = ring.to_half_chunks(query), ring.to_half_chunks(jnp.concatenate([key, value], -1))
    starts = ring.starts(start, query.shape[0])
    if start.ndim:
        query, keys = (ring.without_padding(x, starts) for x in (query, keys))
    states = _forward(spec, ring, implementation, query, keys, sink_logits, starts)
    _, states = same_varying(ring.axis, query, states)
    out = ring.join(_Halves(*(state.out for state in states))).astype(query.dtype)
    lse = ring.join(_Halves(*(state.lse for state in states)), 2)
    out = checkpoint_name(ring.from_half_chunks(out), "context")
    lse = checkpoint_name(ring.from_half_chunks(lse, 2), "context")
    return out, (query, keys, sink_logits, starts, out, lse, start)


def _forward(spec, ring, implementation, query, keys, sink_logits, starts):
    """The states of both halves of the queries."""
    queries = ring.split(query)
    dtype = jnp.promote_types(query.dtype, jnp.float32)

    def attend(launches, states):
        states = list(states)
        for half, run, start in launches:
            learned = sink_logits if states[half] is None else None
            states[half] = attend_keys(
                spec, implementation, queries[half], run, learned, start, None, states[half], dtype
            )
        return tuple(states)

    def step(carry, distance):
        keys, states = carry
        following = ring.pass_on(keys)
        return (following, attend(ring.hop_launches(distance, keys, starts), states)), None

    following = ring.pass_on(keys)
    states = attend(ring.own_launches(keys, starts), (None, None))
    last = ring.axis.size - 1
    distances = jnp.arange(1, last, dtype=jnp.int32)
    (keys, states), _ = lax.scan(step, (following, states), distances)
    return attend(ring.hop_launches(last, keys, starts), states)


def _attend_ring_bwd(spec, ring, implementation, residuals, dout):
    query, keys, sink_logits, starts, out, lse, start = residuals
    outs, douts = ring.to_half_chunks(out), ring.to_half_chunks(dout)
    if start.ndim:
        douts = ring.without_padding(douts, starts)
    outs, douts = ring.split(outs), ring.split(douts)
    lses = ring.split(ring.to_half_chunks(lse, 2), 2)
    finals = tuple(map(State, outs, lses))
    backward = _Backward(spec, implementation, ring.split(query), finals, douts)

    def of_hop(distance, keys, arrived, dqueries):
        launches = ring.hop_launches(distance, keys, starts)
        dqueries, (first, second), _ = backward.through(launches, dqueries)
        return dqueries, arrived + ring.shifted_back(first + second, distance)

    def step(carry, distance):
        keys, sums, dqueries = carry
        following, arrived = ring.pass_on(keys), ring.pass_on(sums)
        dqueries, sums = of_hop(distance, keys, arrived, dqueries)
        return (following, sums, dqueries), None

    following = ring.pass_on(keys)
    launches = ring.own_launches(keys, starts)
    dqueries, (first, second, before), deltas = backward.through(launches, (None, None))
    sums = ring.join(_Halves(first, second)) + ring.shifted_back(before, 0)
    last = ring.axis.size - 1
    distances = jnp.arange(1, last, dtype=jnp.int32)
    (keys, sums, dqueries), _ = lax.scan(step, (following, sums, dqueries), distances)
    dqueries, sums = of_hop(last, keys, ring.pass_on(sums), dqueries)
    dsink_logits = None
    if sink_logits is not None:
        learned = sink_logits.astype(lse.dtype)
        both = zip(lses, deltas[:2], strict=True)
        parts = jnp.stack([sink_logits_gradient(learned, *sums) for sums in both])
        dsink_logits = parts.sum(0).astype(sink_logits.dtype)
    dquery = ring.from_half_chunks(ring.join(_Halves(*dqueries)).astype(query.dtype))
    dkeys = ring.from_half_chunks(ring.pass_on(sums).astype(query.dtype))
    return dquery, dkeys[..., : ring.dim], dkeys[..., ring.dim :], dsink_logits, None


class _Backward(NamedTuple):
    """The inputs that all launches of the backward pass share."""

    spec: Spec
    implementation: str
    queries: _Halves
    finals: tuple[State, ...]
    douts: _Halves

    def through(
        self, launches: Sequence[_Launch], dqueries: tuple[Array | None, Array | None]
    ) -> tuple[tuple[Array, Array], list[Array], list[Array]]:
        """Runs launches: (sums of the queries' gradients, gradients of the keys, deltas).

        The sums are ``dqueries`` plus the gradients of these launches, for each half of the
        queries. Gradients of keys and deltas are listed by launch.
        """
        halves: list[Any] = list(dqueries)
        dkeys, deltas = [], []
        for half, run, start in launches:
            dtype = self.finals[half].lse.dtype
            halves[half], dkey, dvalue, delta = attend_keys_backward(
                self.spec, self.implementation, self.queries[half], run, start, None,
                self.finals[half], self.douts[half], halves[half], dtype, dtype,
            )  # fmt: skip
            dkeys.append(jnp.concatenate([dkey, dvalue], -1))
            deltas.append(delta)
        return (halves[0], halves[1]), dkeys, deltas


attend_ring.defvjp(_attend_ring_fwd, _attend_ring_bwd)
