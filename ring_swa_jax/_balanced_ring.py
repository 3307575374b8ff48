"""Ring attention without a window, with equal work on all devices: exchange="ring".

Device r computes the queries of the half chunks r and 2P - 1 - r. Each device's keys and values
visit all devices in P - 1 hops; the transfer of a hop overlaps with the launches of the hop before.
`_balanced_hops` says which keys of a hop a device sees.

The hops are a loop, so that the program does not grow with the number of devices. The keys in
flight take the memory of three chunks; gathered keys would take that of P. The partial results, and
the gradients of keys and values, which travel with their keys, keep the accumulator's precision.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pallas_kernels import (
    Spec,
    State,
    accumulator_dtype,
    attend_keys,
    attend_keys_backward,
    choose,
    sink_logits_gradient,
)
from ring_swa_jax._axis import SequenceAxis, same_varying
from ring_swa_jax._balanced_hops import BalancedRing, Halves, Launch
from ring_swa_jax._segments import whole_bounds


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
    out = ring.join(Halves(*(state.out for state in states))).astype(query.dtype)
    lse = ring.join(Halves(*(state.lse for state in states)), 2)
    out = checkpoint_name(ring.from_half_chunks(out), "context")
    lse = checkpoint_name(ring.from_half_chunks(lse, 2), "context")
    return out, (query, keys, sink_logits, starts, out, lse, start)


def _forward(spec, ring, implementation, query, keys, sink_logits, starts):
    """The states of both halves of the queries."""
    queries = ring.split(query)
    dtype = accumulator_dtype(query.dtype)

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
        following = ring.axis.pass_on(keys)
        return (following, attend(ring.hop_launches(distance, keys, starts), states)), None

    following = ring.axis.pass_on(keys)
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
        following, arrived = ring.axis.pass_on(keys), ring.axis.pass_on(sums)
        dqueries, sums = of_hop(distance, keys, arrived, dqueries)
        return (following, sums, dqueries), None

    following = ring.axis.pass_on(keys)
    launches = ring.own_launches(keys, starts)
    dqueries, (first, second, before), deltas = backward.through(launches, (None, None))
    sums = ring.join(Halves(first, second)) + ring.shifted_back(before, 0)
    last = ring.axis.size - 1
    distances = jnp.arange(1, last, dtype=jnp.int32)
    (keys, sums, dqueries), _ = lax.scan(step, (following, sums, dqueries), distances)
    dqueries, sums = of_hop(last, keys, ring.axis.pass_on(sums), dqueries)
    dsink_logits = None
    if sink_logits is not None:
        learned = sink_logits.astype(lse.dtype)
        both = zip(lses, deltas[:2], strict=True)
        parts = jnp.stack([sink_logits_gradient(learned, *sums) for sums in both])
        dsink_logits = parts.sum(0).astype(sink_logits.dtype)
    dquery = ring.from_half_chunks(ring.join(Halves(*dqueries)).astype(query.dtype))
    dkeys = ring.from_half_chunks(ring.axis.pass_on(sums).astype(query.dtype))
    return dquery, dkeys[..., : ring.dim], dkeys[..., ring.dim :], dsink_logits, None


class _Backward(NamedTuple):
    """The inputs that all launches of the backward pass share."""

    spec: Spec
    implementation: str
    queries: Halves
    finals: tuple[State, ...]
    douts: Halves

    def through(
        self, launches: Sequence[Launch], dqueries: tuple[Array | None, Array | None]
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
