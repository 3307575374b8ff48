"""Ring attention for windows that reach past the query and lack a bound: exchange="ring".

Each device's keys and values visit all devices in P - 1 hops; the transfer of a hop overlaps with
the launch of the hop before. The keys of a visiting chunk that lie in a query's window are
consecutive: two numbers for each query say which. The same holds for the sink tokens before a
query's window, which have a launch of their own. If the window has no bound, all devices have the
same work. If it has one, a device at one end of the sequence has up to twice the mean.

The hops are a loop, so that the program does not grow with the number of devices. The keys in
flight take the memory of three chunks. The partial results, and the gradients of keys and values,
which travel with their keys, keep the accumulator's precision.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pallas_kernels import (
    KeyRun,
    Spec,
    accumulator_dtype,
    attend_keys,
    attend_keys_backward,
    choose,
    delta_of,
    sink_logits_gradient,
)
from ring_swa_jax._axis import SequenceAxis, same_varying
from ring_swa_jax._layout import in_order_of_tokens
from ring_swa_jax._segments import Bounds, bounds_of, without_padding

_Range = tuple[Int[Array, ""] | Int[Array, "B T"], Int[Array, "B T"] | None]


@dataclasses.dataclass(frozen=True)
class FullRing:
    """The hops of a ring of P chunks, and which keys of each hop this device's queries see.

    Keys and values are one array, and so are their gradients, so that a hop is one message.

    Attributes:
        axis: mesh axis that cuts the sequence.
        chunk: tokens on a device.
        dim: of the keys.
        before: how many keys before a query it sees; None: all.
        after: how many keys after a query it sees; the length of the sequence: all.
        num_sinks: first tokens of its sequence that a query always sees.
    """

    axis: SequenceAxis
    chunk: int
    dim: int
    before: int | None
    after: int
    num_sinks: int

    def run(self, keys: Float[Array, "B T K HHv"]) -> KeyRun:
        """A visiting chunk, placed before all queries: `ranges` alone says what they see."""
        return KeyRun(keys[..., : self.dim], keys[..., self.dim :], -self.chunk)

    def ranges(self, distance: Int[Array, ""] | int, bounds: Bounds, batch: int) -> list[_Range]:
        """The first key of `run` that each query sees, and the one behind the last.

        One such range for the windows, and one for the sink tokens before the windows, if any.

        Args:
            distance: how many devices before this one the chunk's own device is.
            bounds: of the sequences of this device's tokens.
            batch: rows.
        """
        everything = self.before is None and self.after >= self.axis.size * self.chunk
        if everything and not bounds.start.ndim:
            return [(jnp.int32(-self.chunk), None)]
        index = self.axis.index()
        device = (index - distance) % self.axis.size
        chunk_begin = (device - index) * self.chunk
        query = jnp.arange(self.chunk, dtype=jnp.int32)[None]
        assert bounds.end is not None
        low, stop = bounds.start, jnp.minimum(bounds.end, query + self.after + 1)
        if self.before is not None:
            low = jnp.maximum(low, query - self.before)
        found = [(low, stop)]
        if self.num_sinks:
            found.append((bounds.start, jnp.minimum(bounds.start + self.num_sinks, low)))

        def in_chunk(position):
            position = jnp.broadcast_to(position, (batch, self.chunk)) - chunk_begin
            return jnp.clip(position, 0, self.chunk) - self.chunk

        return [(in_chunk(low), in_chunk(stop)) for low, stop in found]


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
    ring = FullRing(axis, chunk, q.shape[-1], spec.keys_before, spec.lookahead, spec.num_sinks)
    # Which keys a query sees is said for each hop.
    spec = dataclasses.replace(spec, window=None, lookahead=0, num_sinks=0)
    name = choose(implementation, spec, q, v)
    bounds = bounds_of(axis, chunk, cu_seqlens, segment_ids, ends=True)
    q, k, v, sink_logits, bounds = same_varying(axis, q, k, v, sink_logits, bounds)

    def attend_in_order(q, k, v):
        return attend_ring(spec, ring, name, q, k, v, sink_logits, bounds)

    return in_order_of_tokens(attend_in_order, axis, layout, q, k, v)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend_ring(
    spec: Spec,
    ring: FullRing,
    implementation: str,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sink_logits: Float[Array, "N"] | None,
    bounds: Bounds,
) -> Float[Array, "B T N Hv"]:
    """Attention of a device's queries to the keys of all devices.

    Args:
        spec: static settings, without a window.
        ring: the hops, and the window.
        implementation: that of the kernels.
        query: queries of the device.
        key: keys of the device; N is a multiple of K.
        value: values of the device.
        sink_logits: learned sinks; all inputs vary over the same manual mesh axes.
        bounds: of the sequences of the device's tokens.
    """
    return _attend_ring_fwd(spec, ring, implementation, query, key, value, sink_logits, bounds)[0]


def _attend_ring_fwd(spec, ring, implementation, query, key, value, sink_logits, bounds):
    keys = jnp.concatenate([key, value], -1)
    if bounds.start.ndim:
        query, keys = (without_padding(x, bounds.start) for x in (query, keys))
    dtype = accumulator_dtype(query.dtype)

    def attend(distance, keys, state):
        for start, end in ring.ranges(distance, bounds, query.shape[0]):
            learned = sink_logits if state is None else None
            state = attend_keys(
                spec, implementation, query, ring.run(keys), learned, start, end, state, dtype
            )
        return state

    def step(carry, distance):
        keys, state = carry
        return (ring.axis.pass_on(keys), attend(distance, keys, state)), None

    following = ring.axis.pass_on(keys)
    state = attend(0, keys, None)
    last = ring.axis.size - 1
    (following, state), _ = lax.scan(step, (following, state), jnp.arange(1, last, dtype=jnp.int32))
    _, state = same_varying(ring.axis, query, attend(last, following, state))
    out = checkpoint_name(state.out.astype(query.dtype), "context")
    lse = checkpoint_name(state.lse, "context")
    return out, (query, keys, sink_logits, bounds, out, lse)


def _attend_ring_bwd(spec, ring, implementation, residuals, dout):
    query, keys, sink_logits, bounds, out, lse = residuals
    if bounds.start.ndim:
        dout = without_padding(dout, bounds.start)
    dtype = lse.dtype
    delta = delta_of(out, dout, dtype)

    def through(distance, keys, dquery):
        """(sum of the queries' gradients, gradient of the visiting keys)."""
        dkeys = []
        for start, end in ring.ranges(distance, bounds, query.shape[0]):
            dquery, dkey, dvalue, _ = attend_keys_backward(
                spec, implementation, query, ring.run(keys), start, end,
                lse, delta, dout, dquery, dtype, dtype,
            )  # fmt: skip
            dkeys.append(jnp.concatenate([dkey, dvalue], -1))
        return dquery, sum(dkeys[1:], dkeys[0])

    def step(carry, distance):
        keys, sums, dquery = carry
        following, arrived = ring.axis.pass_on(keys), ring.axis.pass_on(sums)
        dquery, dkeys = through(distance, keys, dquery)
        return (following, arrived + dkeys, dquery), None

    following = ring.axis.pass_on(keys)
    dquery, sums = through(0, keys, None)
    last = ring.axis.size - 1
    (following, sums, dquery), _ = lax.scan(
        step, (following, sums, dquery), jnp.arange(1, last, dtype=jnp.int32)
    )
    arrived = ring.axis.pass_on(sums)
    dquery, dkeys = through(last, following, dquery)
    dkeys = ring.axis.pass_on(arrived + dkeys).astype(query.dtype)
    dsink_logits = None
    if sink_logits is not None:
        dsink_logits = sink_logits_gradient(sink_logits, lse, delta)
    dkey, dvalue = dkeys[..., : ring.dim], dkeys[..., ring.dim :]
    return dquery.astype(query.dtype), dkey, dvalue, dsink_logits, None


attend_ring.defvjp(_attend_ring_fwd, _attend_ring_bwd)
