"""The differentiable attention of one shard: schedule of the launches, forward and backward.

Keys come in runs: the shard's own, the halo's hops (fetched by a callable that the caller gives)
and fetched sinks. One softmax spans all of them, and the backward pass uses its one
log-sum-exp, so launches may be cut wherever that hides communication:

* A short halo is seen by few rows. The other rows go first, under the permute, then those rows
  with all their keys in one launch: nothing partial leaves a kernel.
* A long halo arrives in hops. All rows attend the shard's own keys first, then each hop's keys
  continue from the (out, lse) of the launch before, in the accumulator's precision.

The backward pass takes the halo first, so that its gradients travel home under the shard's own
backward. A single hop is kept for it; several hops are fetched again, which bounds memory to two
of them, and their gradients travel and add up in the accumulator's precision.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from pallas_kernels import _implementations
from pallas_kernels._spec import (
    KeyRun,
    SinkRun,
    Spec,
    Starts,
    State,
    accumulator_dtype,
    full_like_varying,
)
from pallas_kernels._vmap import folds_vmap


class Halo(Protocol):
    """Keys before the shard that others hold, in hops from near to far. Hashable.

    ``lengths[c]`` is the number of keys of hop c, the last of which stands just before the keys
    of the hop before it. Every hop but the last is as long as the shard.
    """

    lengths: tuple[int, ...]

    def fetch(self, hop: int, key: Array, value: Array) -> tuple[Array, Array]:
        """The keys and values of a hop, from everybody's own keys and values."""
        ...

    def give_back(self, hop: int, dkey: Array, dvalue: Array) -> tuple[Array, Array]:
        """The transpose: gradients of a hop, to the shard that holds its keys (its last ones)."""
        ...


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def attend(
    spec: Spec,
    halo: Halo,
    forward: str,
    backward: str,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sinks: SinkRun | None,
    sink_logits: Float[Array, "N"] | None,
    start: Starts,
) -> Float[Array, "B T N Hv"]:
    """Attention of a shard's queries to its own keys, the halo's and the fetched sinks.

    Args:
        spec: static settings.
        halo: how keys before the shard arrive.
        forward: implementation of the forward pass.
        backward: implementation of the backward pass.
        query: queries of the shard.
        key: its keys; N is a multiple of K.
        value: its values.
        sinks: the first tokens of the sequence that crosses into the shard.
        sink_logits: learned sinks; all inputs vary over the same manual mesh axes.
        start: where each query's sequence starts, relative to the shard.
    """
    arrays = (query, key, value, sinks, sink_logits, start)
    return _forward(spec, halo, forward, *arrays)[0].out


def _attend_fwd(spec, halo, forward, backward, query, key, value, sinks, sink_logits, start):
    arrays = (query, key, value, sinks, sink_logits, start)
    state, kept = _forward(spec, halo, forward, *arrays)
    out = checkpoint_name(state.out, "context")
    lse = checkpoint_name(state.lse, "context")
    return out, (*arrays, kept, out, lse)


def _attend_bwd(spec, halo, forward, backward, residuals, dout):
    del forward
    query, key, value, sinks, sink_logits, start, kept, out, lse = residuals
    dtype = lse.dtype
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(dtype), dout.astype(dtype))
    launch = partial(_launch_backward, spec, backward, query, start, dout, lse, delta)

    dquery = full_like_varying(query, query.shape, 0, dtype)
    homecoming, done = [], []
    for hop, length in enumerate(halo.lengths):
        far = _fetch(halo, hop, done, key, value) if kept is None else kept
        run = KeyRun(*far, _hop_offset(halo, hop))
        dquery, (dfar,), _ = launch((run,), None, dquery, rows=(0, length))
        done.append(dquery[:, :1])
        travel = dtype if len(halo.lengths) > 1 else key.dtype
        homecoming.append(halo.give_back(hop, *(x.astype(travel) for x in dfar)))

    dquery, (down,), dsinks = launch(
        (KeyRun(key, value, 0),), sinks, dquery, rows=(0, query.shape[1])
    )
    for home in homecoming:
        down = tuple(
            own.at[:, own.shape[1] - x.shape[1] :].add(x.astype(dtype))
            for own, x in zip(down, home, strict=True)
        )
    dkey, dvalue = down
    dsink_logits = None
    if sink_logits is not None:
        alive = lse > -jnp.inf
        share = jnp.where(alive, jnp.exp(sink_logits[:, None] - jnp.where(alive, lse, 0)), 0)
        dsink_logits = -jnp.einsum("bnt,bnt->n", share, delta).astype(sink_logits.dtype)
    return (
        dquery.astype(query.dtype),
        dkey.astype(key.dtype),
        dvalue.astype(value.dtype),
        dsinks,
        dsink_logits,
        None,
    )


attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(spec, halo, implementation, query, key, value, sinks, sink_logits, start):
    """The state of all rows, and the halo that the backward pass is to find, if kept."""
    batch, rows, heads, _ = query.shape
    dtype = accumulator_dtype(query.dtype)
    lengths = halo.lengths
    local = KeyRun(key, value, 0)
    launch = partial(_launch_forward, spec, implementation, query, start)
    by_rows = len(lengths) == 1 and 2 * lengths[0] <= rows
    out_dtype = query.dtype if by_rows or not lengths else dtype
    state = State(
        full_like_varying(query, (batch, rows, heads, value.shape[-1]), 0, out_dtype),
        full_like_varying(query, (batch, heads, rows), 0, dtype),
    )
    if sink_logits is not None:
        sink_logits = jnp.broadcast_to(sink_logits, (batch, heads)).astype(dtype)
    fetched: tuple[Array, Array] | None = None
    if by_rows:
        (seeing,) = lengths
        fetched = halo.fetch(0, key, value)
        far = KeyRun(*fetched, _hop_offset(halo, 0))
        state = launch((local,), sinks, sink_logits, state, rows=(seeing, rows))
        state = launch((far, local), sinks, sink_logits, state, rows=(0, seeing))
        return state, fetched
    state = launch((local,), sinks, sink_logits, state, rows=(0, rows))
    done: list[Array] = []
    for hop, length in enumerate(lengths):
        fetched = _fetch(halo, hop, done, key, value)
        far = KeyRun(*fetched, _hop_offset(halo, hop))
        state = launch((far,), None, None, state, rows=(0, length), resume=True)
        done.append(state.lse[:, :, :1])
    kept = fetched if len(lengths) == 1 else None
    return State(state.out.astype(query.dtype), state.lse), kept


def _hop_offset(halo: Halo, hop: int) -> int:
    return -sum(halo.lengths[: hop + 1])


def _fetch(halo: Halo, hop: int, done: list[Array], key: Array, value: Array):
    """Fetches a hop once the hop before the last is ``done``: two halos are alive at most."""
    if hop > 1:
        _, key, value = lax.optimization_barrier((done[hop - 2], key, value))
    return halo.fetch(hop, key, value)


def _launch_forward(
    spec, implementation, query, start, runs, sinks, sink_logits, state, *, rows, resume=False
):
    def launch(query, keys, sinks, sink_logits, start, state):
        runs_here = tuple(KeyRun(*kv, run.offset) for kv, run in zip(keys, runs, strict=True))
        return _implementations.module(implementation).forward(
            spec, query, runs_here, sinks, sink_logits, start, state, rows=rows, resume=resume
        )

    keys = tuple((run.key, run.value) for run in runs)
    return folds_vmap(launch)(query, keys, sinks, sink_logits, start, state)


def _launch_backward(
    spec, implementation, query, start, dout, lse, delta, runs, sinks, dquery, *, rows
):
    def launch(query, keys, sinks, start, dout, lse, delta, dquery):
        runs_here = tuple(KeyRun(*kv, run.offset) for kv, run in zip(keys, runs, strict=True))
        return _implementations.module(implementation).backward(
            spec, query, runs_here, sinks, start, dout, lse, delta, dquery, rows=rows
        )

    keys = tuple((run.key, run.value) for run in runs)
    return folds_vmap(launch)(query, keys, sinks, start, dout, lse, delta, dquery)
