"""The differentiable attention of one shard: schedule of the launches, forward and backward.

Keys come in runs: the shard's own, the halo's hops (fetched by a callable that the caller gives)
and fetched sinks. One softmax spans all of them, and the backward pass uses its one
log-sum-exp, so launches may be cut wherever that hides communication:

* A short halo is seen by few rows. The other rows go first, under the permute, then those rows
  with all their keys in one launch: no partial result is written.
* A long halo arrives in hops. All rows attend the shard's own keys first, then each hop's keys
  continue from the (out, lse) of the launch before, in the accumulator's precision.

The backward pass takes the halo first, so that its gradients travel home under the shard's own
backward. A single hop is kept for it; where an implementation says that it is faster, the hop and
the shard's own keys go together instead, and the hop's gradients travel when that is over. Several
hops are fetched again, which bounds memory to two of them, and their gradients travel and add up in
the accumulator's precision.
"""

from functools import partial

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from pallas_kernels import _implementations
from pallas_kernels._halo import Halo, KeyValue, add_last, fetch_in_turn, hop_run, only_after
from pallas_kernels._kernels import BackwardInputs, ForwardInputs, Gradients, Kernels
from pallas_kernels._launches import (
    launch_backward,
    launch_forward,
    learned_sinks,
    sink_logits_gradient,
)
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts, State, accumulator_dtype
from pallas_kernels._varying import vary_as


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    spec: Spec,
    halo: Halo,
    implementation: str,
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
        implementation: one of ``IMPLEMENTATIONS``, as `choose` returns it.
        query: queries of the shard.
        key: its keys; N is a multiple of K.
        value: its values.
        sinks: the first tokens of the sequence that crosses into the shard.
        sink_logits: learned sinks; all inputs vary over the same manual mesh axes.
        start: where each query's sequence starts, relative to the shard.
    """
    arrays = (query, key, value, sinks, sink_logits, start)
    return _forward(spec, halo, implementation, *arrays)[0].out


def _attend_fwd(
    spec: Spec,
    halo: Halo,
    implementation: str,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sinks: SinkRun | None,
    sink_logits: Float[Array, "N"] | None,
    start: Starts,
) -> tuple[Float[Array, "B T N Hv"], tuple]:
    arrays = (query, key, value, sinks, sink_logits, start)
    state, kept = _forward(spec, halo, implementation, *arrays)
    out = checkpoint_name(state.out, "context")
    lse = checkpoint_name(state.lse, "context")
    return out, (*arrays, kept, out, lse)


def _attend_bwd(
    spec: Spec,
    halo: Halo,
    implementation: str,
    residuals: tuple,
    dout: Float[Array, "B T N Hv"],
) -> tuple:
    query, key, value, sinks, sink_logits, start, kept, out, lse = residuals
    kernels = _implementations.kernels_of(implementation)
    local = KeyRun(key, value, 0)
    inputs = BackwardInputs(query, (local,), sinks, start, out, dout, lse)
    joined = inputs
    if kept is not None:
        joined = inputs._replace(runs=(hop_run(halo, 0, kept), local))

    home: KeyValue | None
    if kept is not None and kernels.prefers_fused_halo_backward(spec, joined):
        gradients = launch_backward(
            spec, kernels, joined, None,
            rows=query.shape[1], dquery_dtype=query.dtype, dkey_dtype=key.dtype,
        )  # fmt: skip
        home = halo.give_back(0, *gradients.dkeys[0])
    else:
        gradients, home = _launch_halo_first(spec, halo, kernels, inputs, kept)
    dkey, dvalue = add_last(gradients.dkeys[-1], home)
    dsink_logits = None
    if sink_logits is not None:
        dsink_logits = sink_logits_gradient(sink_logits, lse, gradients.delta)
    return (
        gradients.dquery,
        dkey.astype(key.dtype),
        dvalue.astype(value.dtype),
        gradients.dsinks,
        dsink_logits,
        None,
    )


attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(
    spec: Spec,
    halo: Halo,
    implementation: str,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sinks: SinkRun | None,
    sink_logits: Float[Array, "N"] | None,
    start: Starts,
) -> tuple[State, KeyValue | None]:
    """The state of all rows, and the halo where the backward pass reuses it."""
    kernels = _implementations.kernels_of(implementation)
    arrays = (query, key, value, sinks, sink_logits, start)
    state, kept = _launch_all_forward(spec, halo, kernels, *arrays)
    # Mosaic GPU's kernels know nothing of manual mesh axes.
    return State(*(vary_as(query, x) for x in state)), kept


def _launch_all_forward(
    spec: Spec,
    halo: Halo,
    kernels: Kernels,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sinks: SinkRun | None,
    sink_logits: Float[Array, "N"] | None,
    start: Starts,
) -> tuple[State, KeyValue | None]:
    rows, dtype, lengths = query.shape[1], accumulator_dtype(query.dtype), halo.lengths
    local = KeyRun(key, value, 0)
    launch = partial(launch_forward, spec, kernels)
    inputs = ForwardInputs(query, (local,), sinks, learned_sinks(sink_logits, query), start)
    if not lengths:
        return launch(inputs, None, rows=(0, rows), out_dtype=query.dtype), None

    shared = (key, value, start)
    if len(lengths) == 1 and kernels.prefers_fused_halo_forward:
        fetched = halo.fetch(0, *shared, after=None)
        joined = inputs._replace(runs=(hop_run(halo, 0, fetched), local))
        return launch(joined, None, rows=(0, rows), out_dtype=query.dtype), fetched

    tile = kernels.query_tile_rows(spec, query, local)
    halo_rows = -(-lengths[0] // tile) * tile  # the rows that see the halo, in whole tiles
    if len(lengths) == 1 and 2 * halo_rows <= rows:
        fetched = halo.fetch(0, *shared, after=None)
        state = launch(inputs, None, rows=(halo_rows, rows), out_dtype=query.dtype)
        late = only_after(state.lse, -1, fetched)
        joined = inputs._replace(runs=(hop_run(halo, 0, late), local))
        state = launch(joined, state, rows=(0, halo_rows), out_dtype=query.dtype)
        return state, fetched

    state = launch(inputs, None, rows=(0, rows), out_dtype=dtype)
    ended: list[Array] = []
    for hop, length in enumerate(lengths):
        fetched = fetch_in_turn(halo, hop, ended, *shared)
        of_hop = ForwardInputs(query, (hop_run(halo, hop, fetched),), None, None, start)
        state = launch(of_hop, state, rows=(0, length), out_dtype=dtype, resume=True)
        ended.append(state.lse[0, 0, 0])
    kept = fetched if len(lengths) == 1 else None
    return State(state.out.astype(query.dtype), state.lse), kept


def _launch_halo_first(
    spec: Spec, halo: Halo, kernels: Kernels, inputs: BackwardInputs, kept: KeyValue | None
) -> tuple[Gradients, KeyValue | None]:
    """The gradients through the shard's own keys, and those that came home from the halo's.

    ``kept`` is the halo where the forward pass has kept it; else its hops are fetched again.
    """
    query, (local,), dtype = inputs.query, inputs.runs, inputs.lse.dtype
    travel = dtype if len(halo.lengths) > 1 else local.key.dtype
    launch = partial(launch_backward, spec, kernels, dkey_dtype=travel)
    shared = (local.key, local.value, inputs.start)
    dquery = home = None
    # The last hop first: the fewest rows see it, so dquery and home only ever grow.
    done: list[Array] = []
    for hop in reversed(range(len(halo.lengths))):
        fetched = fetch_in_turn(halo, hop, done, *shared) if kept is None else kept
        of_hop = inputs._replace(runs=(hop_run(halo, hop, fetched),), sinks=None)
        found = launch(of_hop, dquery, rows=halo.lengths[hop], dquery_dtype=dtype)
        dquery = found.dquery
        home = add_last(halo.give_back(hop, *found.dkeys[0]), home)
        done.append(home[0][0, -1, 0, 0])
    gradients = launch(inputs, dquery, rows=query.shape[1], dquery_dtype=query.dtype)
    return gradients, home
