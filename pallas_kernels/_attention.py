"""The differentiable attention of one shard: schedule of the launches, forward and backward.

Keys come in runs: the shard's own, the halo's hops (fetched by a callable that the caller gives)
and fetched sinks. One softmax spans all of them, and the backward pass uses its one
log-sum-exp, so launches may be cut wherever that hides communication:

* A short halo is seen by few rows. The other rows go first, under the permute, then those rows
  with all their keys in one launch: no partial result is written (`_other_rows_first`).
* A long halo arrives in hops. All rows attend the shard's own keys first, then each hop's keys
  continue from the (out, lse) of the launch before, in the accumulator's precision
  (`_own_keys_first`).
* Where a backend prefers it, one launch takes a single hop and the shard's own keys.

The backward pass takes the halo first, so that its gradients travel home under the launch of the
shard's own keys (`_halo_first`). A single hop is kept for it. Where a backend prefers it, one
launch takes this hop and the shard's own keys, and the hop's gradients travel when that is over.
Several hops are fetched again, which bounds memory to two of them, and their gradients travel and
add up in the accumulator's precision.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
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


class _Arrays(NamedTuple):
    """The arrays of `attend`, in the order of its arguments."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K Hv"]
    sinks: SinkRun | None
    sink_logits: Float[Array, "N"] | None
    start: Starts


class _Residuals(NamedTuple):
    """What the backward pass needs; ``hop`` has the keys of a single hop, else it is None."""

    arrays: _Arrays
    hop: KeyValue | None
    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B N T"]


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
    arrays = _Arrays(query, key, value, sinks, sink_logits, start)
    return _forward(spec, halo, implementation, arrays)[0].out


def _attend_fwd(
    spec: Spec, halo: Halo, implementation: str, *arrays: Any
) -> tuple[Float[Array, "B T N Hv"], _Residuals]:
    named = _Arrays(*arrays)
    state, hop = _forward(spec, halo, implementation, named)
    out = checkpoint_name(state.out, "context")
    lse = checkpoint_name(state.lse, "context")
    return out, _Residuals(named, hop, out, lse)


def _attend_bwd(
    spec: Spec,
    halo: Halo,
    implementation: str,
    residuals: _Residuals,
    dout: Float[Array, "B T N Hv"],
) -> tuple:
    (query, key, value, sinks, sink_logits, start), hop, out, lse = residuals
    kernels = _implementations.kernels_of(implementation)
    own = KeyRun(key, value, 0)
    inputs = BackwardInputs(query, (own,), sinks, start, out, dout, lse)
    with_hop = inputs
    if hop is not None:
        with_hop = inputs._replace(runs=(hop_run(halo, 0, hop), own))

    home: KeyValue | None
    if hop is not None and kernels.prefers_fused_halo_backward(spec, with_hop):
        gradients = launch_backward(
            spec, kernels, with_hop, None,
            rows=query.shape[1], dquery_dtype=query.dtype, dkey_dtype=key.dtype,
        )  # fmt: skip
        home = halo.give_back(0, *gradients.dkeys[0])
    else:
        gradients, home = _halo_first(spec, halo, kernels, inputs, hop)
    dkey, dvalue = add_last(gradients.dkeys[-1], home)
    dsink_logits = sink_logits_gradient(sink_logits, lse, gradients.delta)
    dkeys = dkey.astype(key.dtype), dvalue.astype(value.dtype)
    return gradients.dquery, *dkeys, gradients.dsinks, dsink_logits, None


attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(
    spec: Spec, halo: Halo, implementation: str, arrays: _Arrays
) -> tuple[State, KeyValue | None]:
    """The state of all rows; and the hop, if there is a single one, for the backward pass."""
    query, key, value, sinks, sink_logits, start = arrays
    kernels = _implementations.kernels_of(implementation)
    own, rows = KeyRun(key, value, 0), query.shape[1]
    inputs = ForwardInputs(query, (own,), sinks, learned_sinks(sink_logits, query), start)
    launch = partial(launch_forward, spec, kernels)
    hop = None
    if not halo.lengths:
        state = launch(inputs, None, rows=(0, rows), out_dtype=query.dtype)
    elif len(halo.lengths) > 1:
        state, _ = _own_keys_first(launch, halo, inputs)
    elif kernels.prefers_fused_halo_forward:
        hop = halo.fetch(0, key, value, start, after=None)
        with_hop = inputs._replace(runs=(hop_run(halo, 0, hop), own))
        state = launch(with_hop, None, rows=(0, rows), out_dtype=query.dtype)
    else:
        tile = kernels.query_tile_rows(spec, query, own)
        halo_rows = pl.cdiv(halo.lengths[0], tile) * tile
        if 2 * halo_rows <= rows:
            state, hop = _other_rows_first(launch, halo, inputs, halo_rows)
        else:
            state, hop = _own_keys_first(launch, halo, inputs)
    return State(*(vary_as(query, x) for x in state)), hop


def _other_rows_first(
    launch: Callable[..., State], halo: Halo, inputs: ForwardInputs, halo_rows: int
) -> tuple[State, KeyValue]:
    """The rows that do not see the one hop while it travels; then the others with all their keys.

    Args:
        launch: `launch_forward` by a backend.
        halo: of one hop.
        inputs: with the shard's own keys.
        halo_rows: how many rows see the halo, in whole tiles.
    """
    (own,), rows, dtype = inputs.runs, inputs.query.shape[1], inputs.query.dtype
    hop = halo.fetch(0, own.key, own.value, inputs.start, after=None)
    state = launch(inputs, None, rows=(halo_rows, rows), out_dtype=dtype)
    late_hop = only_after(state.lse, -1, hop)
    with_hop = inputs._replace(runs=(hop_run(halo, 0, late_hop), own))
    return launch(with_hop, state, rows=(0, halo_rows), out_dtype=dtype), hop


def _own_keys_first(
    launch: Callable[..., State], halo: Halo, inputs: ForwardInputs
) -> tuple[State, KeyValue]:
    """All rows with the shard's own keys, then with each hop's; the last hop that was fetched.

    Arguments as of `_other_rows_first`.
    """
    (own,), query = inputs.runs, inputs.query
    dtype = accumulator_dtype(query.dtype)
    state = launch(inputs, None, rows=(0, query.shape[1]), out_dtype=dtype)
    ended: list[Array] = []  # a number of each launch's, which exists when that is over
    for n, length in enumerate(halo.lengths):
        hop = fetch_in_turn(halo, n, ended, own.key, own.value, inputs.start)
        of_hop = ForwardInputs(query, (hop_run(halo, n, hop),), None, None, inputs.start)
        state = launch(of_hop, state, rows=(0, length), out_dtype=dtype, resume=True)
        ended.append(state.lse[0, 0, 0])
    return State(state.out.astype(query.dtype), state.lse), hop


def _halo_first(
    spec: Spec, halo: Halo, kernels: Kernels, inputs: BackwardInputs, kept: KeyValue | None
) -> tuple[Gradients, KeyValue | None]:
    """The gradients through the shard's own keys, and those that came home from the halo's.

    ``kept`` is the hop that the forward pass has kept; if None, hops are fetched again.
    """
    query, (own,), dtype = inputs.query, inputs.runs, inputs.lse.dtype
    travel_dtype = dtype if len(halo.lengths) > 1 else own.key.dtype
    launch = partial(launch_backward, spec, kernels, dkey_dtype=travel_dtype)
    dquery = home = None
    # The last hop first: the fewest rows see it, so dquery and home only ever grow.
    ended: list[Array] = []
    for n in reversed(range(len(halo.lengths))):
        hop = kept
        if hop is None:
            hop = fetch_in_turn(halo, n, ended, own.key, own.value, inputs.start)
        of_hop = inputs._replace(runs=(hop_run(halo, n, hop),), sinks=None)
        gradients = launch(of_hop, dquery, rows=halo.lengths[n], dquery_dtype=dtype)
        dquery = gradients.dquery
        home = add_last(halo.give_back(n, *gradients.dkeys[0]), home)
        ended.append(home[0][0, -1, 0, 0])
    gradients = launch(inputs, dquery, rows=query.shape[1], dquery_dtype=query.dtype)
    return gradients, home
