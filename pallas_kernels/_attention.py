"""The differentiable attention of one shard: schedule of the launches, forward and backward.

Keys come in runs: the shard's own, the halo's hops (fetched by a callable that the caller gives)
and fetched sinks. One softmax spans all of them, and the backward pass uses its one
log-sum-exp, so launches may be cut wherever that hides communication:

* A short halo is seen by few rows. The other rows go first, under the permute, then those rows
  with all their keys in one launch: nothing partial leaves a kernel.
* A long halo arrives in hops. All rows attend the shard's own keys first, then each hop's keys
  continue from the (out, lse) of the launch before, in the accumulator's precision.

The backward pass takes the halo first, so that its gradients travel home under the shard's own
backward. A single hop is kept for it; where an implementation says that it is faster, the hop and
the shard's own keys go together instead, and the hop's gradients travel when that is over. Several
hops are fetched again, which bounds memory to two of them, and their gradients travel and add up in
the accumulator's precision.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from pallas_kernels import _implementations
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts, State, accumulator_dtype
from pallas_kernels._varying import vary_as
from pallas_kernels._vmap import folds_vmap


class Halo(Protocol):
    """Keys before the shard that others hold, in hops from near to far. Hashable.

    ``lengths[c]`` is the number of keys of hop c, the last of which stands just before the keys
    of the hop before it. Every hop but the last is as long as the shard.
    """

    lengths: tuple[int, ...]

    def fetch(
        self, hop: int, key: Array, value: Array, *, after: Array | None
    ) -> tuple[Array, Array]:
        """The keys and values of a hop, from everybody's own, once the number ``after`` exists."""
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
    launch = partial(_launch_backward, spec, backward, query, start, out, dout, lse)

    local = KeyRun(key, value, 0)
    rows = query.shape[1]
    travel = dtype if len(halo.lengths) > 1 else key.dtype
    runs = (local,) if kept is None else (_hop_run(halo, 0, kept), local)
    dquery = home = None
    if len(runs) > 1 and _implementations.module(backward).joins(spec, query, runs, sinks):
        dquery, (dfar, dlocal), dsinks, delta = launch(runs, sinks, None, rows, query.dtype, travel)
        home = halo.give_back(0, *dfar)
    else:
        # The farthest hop first: it reaches the fewest rows, so dquery and home only ever grow.
        done: list[Array] = []
        for hop in reversed(range(len(halo.lengths))):
            far = _fetch(halo, hop, done, key, value) if kept is None else kept
            run = _hop_run(halo, hop, far)
            dquery, (dfar,), _, _ = launch((run,), None, dquery, halo.lengths[hop], dtype, travel)
            home = _add_last(halo.give_back(hop, *dfar), home)
            done.append(home[0][0, -1, 0, 0])
        dquery, (dlocal,), dsinks, delta = launch(
            (local,), sinks, dquery, rows, query.dtype, travel
        )
    dkey, dvalue = _add_last(dlocal, home)
    dsink_logits = None
    if sink_logits is not None:
        alive = lse > -jnp.inf
        share = jnp.where(alive, jnp.exp(sink_logits[:, None] - jnp.where(alive, lse, 0)), 0)
        dsink_logits = -(share * delta).sum((0, 2)).astype(sink_logits.dtype)
    return (
        dquery,
        dkey.astype(key.dtype),
        dvalue.astype(value.dtype),
        dsinks,
        dsink_logits,
        None,
    )


attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(spec, halo, implementation, query, key, value, sinks, sink_logits, start):
    """The state of all rows, and the halo that the backward pass is to find, if kept."""
    arrays = (query, key, value, sinks, sink_logits, start)
    state, kept = _launch_all_forward(spec, halo, implementation, *arrays)
    # Mosaic GPU's kernels know nothing of manual mesh axes.
    return State(*(vary_as(query, x) for x in state)), kept


def _launch_all_forward(spec, halo, implementation, query, key, value, sinks, sink_logits, start):
    batch, rows, heads, _ = query.shape
    dtype = accumulator_dtype(query.dtype)
    lengths = halo.lengths
    local = KeyRun(key, value, 0)
    launch = partial(_launch_forward, spec, implementation, query, start)
    if sink_logits is not None:
        sink_logits = jnp.broadcast_to(sink_logits, (batch, heads)).astype(dtype)
    if not lengths:
        return launch((local,), sinks, sink_logits, None, (0, rows), query.dtype), None

    tile = _implementations.module(implementation).query_tile_rows(spec, query, local)
    near = -(-lengths[0] // tile) * tile
    if len(lengths) == 1 and 2 * near <= rows:
        fetched = halo.fetch(0, key, value, after=None)
        state = launch((local,), sinks, sink_logits, None, (near, rows), query.dtype)
        # What needs the halo waits for the launch, so that the halo travels under it.
        done = state.lse[0, 0, -1] <= jnp.inf  # True, but no compiler may assume it
        far, far_value = (jnp.where(done, x, jnp.nan) for x in fetched)
        runs = (_hop_run(halo, 0, (far, far_value)), local)
        state = launch(runs, sinks, sink_logits, state, (0, near), query.dtype)
        return state, fetched

    state = launch((local,), sinks, sink_logits, None, (0, rows), dtype)
    ended: list[Array] = []
    for hop, length in enumerate(lengths):
        fetched = _fetch(halo, hop, ended, key, value)
        run = _hop_run(halo, hop, fetched)
        state = launch((run,), None, None, state, (0, length), dtype, resume=True)
        ended.append(state.lse[0, 0, 0])
    kept = fetched if len(lengths) == 1 else None
    return State(state.out.astype(query.dtype), state.lse), kept


def _add_last(longer: tuple[Array, Array], shorter: tuple[Array, Array] | None):
    """Adds keys' gradients to those of the last keys of a longer run."""
    if shorter is None:
        return longer
    begin = longer[0].shape[1] - shorter[0].shape[1]
    if begin == 0:  # as .at[0:] it would crash the compiler of jax 0.11.2, inside shard_map
        return tuple(x + y for x, y in zip(longer, shorter, strict=True))
    return tuple(x.at[:, begin:].add(y) for x, y in zip(longer, shorter, strict=True))


def _hop_run(halo: Halo, hop: int, fetched: tuple[Array, Array]) -> KeyRun:
    key, value = fetched
    return KeyRun(key, value, -sum(halo.lengths[: hop + 1]))


def _fetch(halo: Halo, hop: int, done: list[Array], key: Array, value: Array):
    """Fetches a hop when the hop before the last is done, so that two are in flight."""
    return halo.fetch(hop, key, value, after=done[-2] if len(done) > 1 else None)


def _launch_forward(
    spec,
    implementation,
    query,
    start,
    runs,
    sinks,
    sink_logits,
    state,
    rows,
    out_dtype,
    *,
    resume=False,
):
    def launch(query, keys, sinks, sink_logits, start, state):
        return _implementations.module(implementation).forward(
            spec,
            query,
            _with_offsets(keys, runs),
            sinks,
            sink_logits,
            start,
            state,
            rows=rows,
            resume=resume,
            out_dtype=out_dtype,
        )

    return folds_vmap(launch)(query, _without_offsets(runs), sinks, sink_logits, start, state)


def _launch_backward(
    spec,
    implementation,
    query,
    start,
    out,
    dout,
    lse,
    runs,
    sinks,
    dquery,
    rows,
    dquery_dtype,
    dkey_dtype,
):
    def launch(query, keys, sinks, start, out, dout, lse, dquery):
        return _implementations.module(implementation).backward(
            spec,
            query,
            _with_offsets(keys, runs),
            sinks,
            start,
            out,
            dout,
            lse,
            dquery,
            rows=rows,
            dquery_dtype=dquery_dtype,
            dkey_dtype=dkey_dtype,
        )

    keys = _without_offsets(runs)
    return folds_vmap(launch)(query, keys, sinks, start, out, dout, lse, dquery)


def _without_offsets(runs: tuple[KeyRun, ...]) -> tuple[tuple[Array, Array], ...]:
    return tuple((run.key, run.value) for run in runs)


def _with_offsets(keys, runs: tuple[KeyRun, ...]) -> tuple[KeyRun, ...]:
    return tuple(KeyRun(k, v, run.offset) for (k, v), run in zip(keys, runs, strict=True))
