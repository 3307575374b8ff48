"""Ring attention without a window, with equal work on all devices: exchange="ring".

A device first attends within its own chunk, which needs no exchange. Meanwhile the devices swap
half chunks, so that each has a pair (`_half_chunk_pairs`). Then each device's keys and values visit
all devices; the transfer of a hop overlaps with the launch of the hop before. At the end the
results of the swapped half chunks return, and are added to those of the own chunk.

The hops are a loop, so that the program does not grow with the number of devices. The keys in
flight take the memory of three chunks; gathered keys would take that of P. The partial results, and
the gradients of keys and values, which travel with their keys, keep the accumulator's precision.
What returns at the end is in the dtype of the queries.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pallas_kernels import (
    KeyRun,
    Spec,
    State,
    accumulator_dtype,
    attend_keys,
    attend_keys_backward,
    choose,
    delta_of,
    sink_logits_gradient,
)
from ring_swa_jax._axis import SequenceAxis, after, same_varying
from ring_swa_jax._balanced_hops import Hops, HopsOfDocuments, HopsOfOneSequence
from ring_swa_jax._half_chunk_pairs import Pairs
from ring_swa_jax._one_message import packed, unpacked
from ring_swa_jax._segments import whole_bounds, without_padding


class _Ring(NamedTuple):
    """Static settings of a ring."""

    spec: Spec
    implementation: str
    pairs: Pairs
    dim: int

    def run(self, keys: Float[Array, "B T K HHv"], offset: int) -> KeyRun:
        """Keys and values, which hops and gradients have in one array."""
        return KeyRun(keys[..., : self.dim], keys[..., self.dim :], offset)


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
    pairs = Pairs(axis, layout, q.shape[1])
    start, _ = whole_bounds(axis, pairs.chunk, cu_seqlens, segment_ids)
    rows = slice(pairs.halves.longest if start.ndim else None)
    ring = _Ring(spec, choose(implementation, spec, q[:, rows], v[:, rows]), pairs, q.shape[-1])
    q, k, v, sink_logits, start = same_varying(axis, q, k, v, sink_logits, start)
    return attend_ring(ring, q, k, v, sink_logits, start)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_ring(
    ring: _Ring,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sink_logits: Float[Array, "N"] | None,
    start: Int[Array, ""] | Int[Array, "B S"],
) -> Float[Array, "B T N Hv"]:
    """Attention of a device's queries to all keys before them.

    Args:
        ring: static settings.
        query: queries of the device, in the caller's layout.
        key: keys of the device; N is a multiple of K.
        value: values of the device.
        sink_logits: learned sinks; all inputs vary over the same manual mesh axes.
        start: for each query of the whole sequence, in the order of the tokens, the position of
            the first token of the query's document.
    """
    return _attend_ring_fwd(ring, query, key, value, sink_logits, start)[0]


def _attend_ring_fwd(ring, query, key, value, sink_logits, start):
    keys, pairs = jnp.concatenate([key, value], -1), ring.pairs
    own_start = pairs.starts_in_chunk(start)
    if start.ndim:
        query, keys = (without_padding(x, own_start) for x in (query, keys))
    dtype = accumulator_dtype(query.dtype)
    hops = _hops(pairs, start, query.shape[0])
    (queries, visitors), leaving = pairs.swap([query, keys])
    visitors, leaving = _first_visitors(pairs, visitors, leaving)
    own = attend_keys(
        ring.spec, ring.implementation, query, ring.run(keys, 0), sink_logits,
        after(own_start, leaving), None, None, dtype,
    )  # fmt: skip
    # Only after the own chunk's launch does anything wait for the message that swaps half chunks.
    queries, visitors = (after(x, own.lse) for x in (queries, visitors))
    others = _forward(ring, hops, hops.rows(queries), visitors)
    _, own, others = same_varying(pairs.axis, query, own, others)
    others = State(
        pairs.swap_back(hops.from_rows(others.out), query.dtype),
        _heads_first(pairs.swap_back(hops.from_rows(_tokens_first(others.lse)), dtype)),
    )
    final = _merged(own, others)
    out = checkpoint_name(final.out.astype(query.dtype), "context")
    lse = checkpoint_name(final.lse, "context")
    return out, (query, keys, sink_logits, start, out, lse)


def _forward(
    ring: _Ring, hops: Hops, query: Float[Array, "B T N H"], keys: Float[Array, "b chunk K HHv"]
) -> State:
    """Attention of a pair's queries to the keys of all hops, of which ``keys`` are the first."""
    pairs, dtype = ring.pairs, accumulator_dtype(query.dtype)

    def attend(distance, keys, state, leaving=None):
        run = ring.run(hops.keys(keys, distance), -pairs.chunk)
        start = after(hops.starts(distance), leaving)
        return attend_keys(
            ring.spec, ring.implementation, query, run, None, start, None, state, dtype
        )

    def step(carry, distance):
        keys, state = carry
        return (pairs.axis.pass_on(keys), attend(distance, keys, state)), None

    first, last = pairs.first_hop, pairs.axis.size - 1
    if first == last:
        return attend(last, keys, None)
    following = pairs.axis.pass_on(keys)
    state = attend(first, keys, None, keys)
    distances = jnp.arange(first + 1, last, dtype=jnp.int32)
    (keys, state), _ = lax.scan(step, (following, state), distances)
    return attend(last, keys, state)


def _attend_ring_bwd(ring, residuals, dout):
    query, keys, sink_logits, start, out, lse = residuals
    pairs, dtype = ring.pairs, lse.dtype
    own_start = pairs.starts_in_chunk(start)
    if start.ndim:
        dout = without_padding(dout, own_start)
    hops, delta = _hops(pairs, start, query.shape[0]), delta_of(out, dout, dtype)
    (sums,), _ = pairs.swap([_tokens_first(jnp.stack([lse, delta], -1))])
    (queries, visitors, douts), leaving = pairs.swap([query, keys, dout])
    visitors, leaving = _first_visitors(pairs, visitors, leaving)
    own_keys = ring.run(keys, 0)
    dquery, dkey, dvalue, delta = attend_keys_backward(
        ring.spec, ring.implementation, query, own_keys, after(own_start, leaving), None,
        lse, delta, dout, None, dtype, dtype,
    )  # fmt: skip
    queries, visitors, douts = (after(x, dkey) for x in (queries, visitors, douts))
    inputs = _BackwardRows(*map(hops.rows, (queries, douts, sums)))
    dquery_of_hops, dkeys_of_hops = _backward(ring, hops, inputs, visitors)
    _, dquery, dquery_of_hops = same_varying(pairs.axis, query, dquery, dquery_of_hops)
    dquery += pairs.swap_back(hops.from_rows(dquery_of_hops), query.dtype)
    dkeys = pairs.swap_back(dkeys_of_hops, query.dtype).astype(dtype)
    dkeys += jnp.concatenate([dkey, dvalue], -1)
    dkeys = ring.run(dkeys.astype(query.dtype), 0)
    dsink_logits = None
    if sink_logits is not None:
        dsink_logits = sink_logits_gradient(sink_logits, lse, delta)
    return dquery.astype(query.dtype), dkeys.key, dkeys.value, dsink_logits, None


class _BackwardRows(NamedTuple):
    """What the launches of the backward pass need of the queries: ``sums`` are lse and delta."""

    query: Float[Array, "R rows N H"]
    dout: Float[Array, "R rows N Hv"]
    sums: Float[Array, "R rows N 2"]


def _backward(
    ring: _Ring, hops: Hops, rows: _BackwardRows, keys: Float[Array, "B T K HHv"]
) -> tuple[Float[Array, "R rows N H"], Float[Array, "B T K HHv"]]:
    """The gradients of a pair's queries, and of its keys, through all hops."""
    pairs, dtype = ring.pairs, rows.sums.dtype
    first, last = pairs.first_hop, pairs.axis.size - 1
    lse, delta = jnp.moveaxis(_heads_first(rows.sums), -1, 0)

    def through(distance, keys, dquery, *, leaving=None, is_last=False):
        """(sum of the queries' gradients, gradient of the visiting keys)."""
        run = ring.run(hops.keys(keys, distance), -pairs.chunk)
        start = after(hops.starts(distance), leaving)
        dquery, dkey, dvalue, _ = attend_keys_backward(
            ring.spec, ring.implementation, rows.query, run, start, None,
            lse, delta, rows.dout, dquery, dtype if is_last else None, dtype,
        )  # fmt: skip
        return dquery, hops.keys_gradient(jnp.concatenate([dkey, dvalue], -1), distance)

    def step(carry, distance):
        message, dquery = carry
        arrived = pairs.axis.pass_on(message)
        dquery, dkeys = through(distance, unpacked(message, keys)[0], dquery)
        following, sums = unpacked(arrived, keys)
        return (packed(following, sums + dkeys), dquery), None

    if first == last:
        dquery, dkeys = through(last, keys, None, is_last=True)
        return dquery, pairs.axis.pass_on(dkeys.astype(keys.dtype))
    following = pairs.axis.pass_on(keys)
    dquery, dkeys = through(first, keys, None, leaving=keys)
    distances = jnp.arange(first + 1, last, dtype=jnp.int32)
    (message, dquery), _ = lax.scan(step, (packed(following, dkeys), dquery), distances)
    visitors, sums = unpacked(message, keys)
    arrived = pairs.axis.pass_on(sums)
    dquery, dkeys = through(last, visitors, dquery, is_last=True)
    return dquery, pairs.axis.pass_on((arrived + dkeys).astype(keys.dtype))


attend_ring.defvjp(_attend_ring_fwd, _attend_ring_bwd)


def _hops(pairs: Pairs, start: Int[Array, ""] | Int[Array, "B S"], batch: int) -> Hops:
    return HopsOfDocuments(pairs, start) if start.ndim else HopsOfOneSequence(pairs, batch)


def _first_visitors(pairs: Pairs, keys: Array, leaving: Array) -> tuple[Array, Array]:
    """(keys of the first hop, what leaves under the launch of the own chunk)."""
    return (pairs.axis.pass_on(keys), keys) if pairs.first_hop else (keys, leaving)


def _tokens_first(sums: Float[Array, "B N T *_"]) -> Float[Array, "B T N *_"]:
    return jnp.moveaxis(sums, 1, 2)


def _heads_first(sums: Float[Array, "B T N *_"]) -> Float[Array, "B N T *_"]:
    return jnp.moveaxis(sums, 2, 1)


def _merged(state: State, other: State) -> State:
    """Attention to the keys of two states."""
    top = jnp.maximum(state.lse, other.lse)
    has_keys = top > -jnp.inf
    top = jnp.where(has_keys, top, jnp.zeros_like(top))
    weights = [jnp.exp(x.lse - top) for x in (state, other)]
    total = jnp.where(has_keys, weights[0] + weights[1], jnp.ones_like(top))
    out, more = (
        x.out * _tokens_first(weight / total)[..., None]
        for x, weight in zip((state, other), weights, strict=True)
    )
    return State(out + more, jnp.where(has_keys, top + jnp.log(total), -jnp.inf))
