"""The differentiable attention of one shard whose queries see keys after themselves.

Only the first and the last rows see a short halo. The rows between them go first, in two launches:
the keys before the shard arrive under the first one, the keys after it under the second one. Then
come the first rows, and the last rows.
With long halos, and in the backward pass, one launch takes the halos of both sides and the shard's
own keys. The halos are kept for the backward pass. Gradients of several hops travel and add up in
the accumulator's precision.
"""

from functools import partial
from typing import NamedTuple

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Float

from pallas_kernels import _implementations
from pallas_kernels._halo import Halo, KeyValue, add_first, add_last, only_after
from pallas_kernels._kernels import BackwardInputs, ForwardInputs
from pallas_kernels._launches import (
    launch_backward,
    launch_forward,
    learned_sinks,
    sink_logits_gradient,
)
from pallas_kernels._spec import Ends, KeyRun, SinkRun, Spec, Starts, State
from pallas_kernels._varying import vary_as


class Sides(NamedTuple):
    """The keys before the shard and those after it, which other devices hold.

    ``after`` is the mirror image of ``before``: its hop c begins just behind its hop c - 1.
    """

    before: Halo
    after: Halo


# The hops of both sides.
_Fetched = tuple[list[KeyValue], list[KeyValue]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend_both_sides(
    spec: Spec,
    sides: Sides,
    implementation: str,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sinks: SinkRun | None,
    sink_logits: Float[Array, "N"] | None,
    start: Starts,
    end: Ends,
) -> Float[Array, "B T N Hv"]:
    """Attention of a shard's queries to its own keys, those around the shard and fetched sinks.

    Args:
        spec: static settings.
        sides: how keys before and after the shard arrive.
        implementation: one of ``IMPLEMENTATIONS``, as `choose` returns it.
        query: queries of the shard.
        key: its keys; N is a multiple of K.
        value: its values.
        sinks: the first tokens of the sequence that crosses into the shard.
        sink_logits: learned sinks; all inputs vary over the same manual mesh axes.
        start: where each query's sequence starts, relative to the shard.
        end: where each query's sequence ends, likewise; None where no key behind it is here.
    """
    arrays = (query, key, value, sinks, sink_logits, start, end)
    return _attend_fwd(spec, sides, implementation, *arrays)[0]


def _attend_fwd(spec, sides, implementation, query, key, value, sinks, sink_logits, start, end):
    learned = learned_sinks(sink_logits, query)
    own = KeyRun(key, value, spec.first_key)
    inputs = ForwardInputs(query, (own,), sinks, learned, *spec.moved(start, end))
    state, fetched = _launch_all_forward(spec, sides, implementation, inputs, start)
    # Mosaic GPU's kernels know nothing of manual mesh axes.
    out = checkpoint_name(vary_as(query, state.out), "context")
    lse = checkpoint_name(vary_as(query, state.lse), "context")
    return out, (query, key, value, sinks, sink_logits, start, end, fetched, out, lse)


def _launch_all_forward(
    spec: Spec, sides: Sides, implementation: str, inputs: ForwardInputs, start: Starts
) -> tuple[State, _Fetched]:
    """The state of all rows, and the fetched keys of both sides."""
    kernels = _implementations.kernels_of(implementation)
    (own,), rows = inputs.runs, inputs.query.shape[1]
    launch = partial(launch_forward, spec, kernels, out_dtype=inputs.query.dtype)

    def fetch(halo, after=None):
        hops = range(len(halo.lengths))
        return [halo.fetch(hop, own.key, own.value, start, after=after) for hop in hops]

    def with_runs(before, after):
        fetched = list(before), list(after)
        return inputs._replace(runs=_runs(spec, sides, (own.key, own.value), fetched))

    tile = kernels.query_tile_rows(spec, inputs.query, own)
    has_halos = any(sides.before.lengths) or any(sides.after.lengths)
    begin = pl.cdiv(sum(sides.before.lengths), tile) * tile
    stop = (rows - sum(sides.after.lengths)) // tile * tile if any(sides.after.lengths) else rows
    few_rows_see_them = 2 * (begin + rows - stop) <= rows
    if kernels.prefers_fused_halo_forward or not has_halos or not few_rows_see_them:
        fetched = fetch(sides.before), fetch(sides.after)
        return launch(with_runs(*fetched), None, rows=(0, rows)), fetched

    before = fetch(sides.before)
    # Of several messages at once XLA lets only the last travel under a kernel. So each one has a
    # launch of its own to travel under. Under that of the first rows, on four H100 with a window of
    # (512, 512), the second message took most of its time when that launch was over.
    both = bool(before and sides.after.lengths)
    half = begin + pl.cdiv(stop - begin, 2 * tile) * tile if both else stop
    state = launch(inputs, None, rows=(begin, half))
    under_first = partial(only_after, state.lse, begin)
    after = fetch(sides.after, state.lse[0, 0, begin] if before else None)
    under_second = under_first
    if half < stop:
        state = launch(inputs, state, rows=(half, stop))
        under_second = partial(only_after, state.lse, half)
    if before:
        state = launch(with_runs(map(under_first, before), []), state, rows=(0, begin))
    if after:
        state = launch(with_runs([], map(under_second, after)), state, rows=(stop, rows))
    return state, (before, after)


def _attend_bwd(spec, sides, implementation, residuals, dout):
    query, key, value, sinks, sink_logits, start, end, fetched, out, lse = residuals
    start, end = spec.moved(start, end)
    runs = _runs(spec, sides, (key, value), fetched)
    inputs = BackwardInputs(query, runs, sinks, start, out, dout, lse, end)
    several_hops = max(len(halo.lengths) for halo in sides) > 1
    gradients = launch_backward(
        spec,
        _implementations.kernels_of(implementation),
        inputs,
        None,
        rows=query.shape[1],
        dquery_dtype=query.dtype,
        dkey_dtype=lse.dtype if several_hops else key.dtype,
    )
    dkey, dvalue = _sent_home(sides, gradients.dkeys)
    dsink_logits = None
    if sink_logits is not None:
        dsink_logits = sink_logits_gradient(sink_logits, lse, gradients.delta)
    dkeys = dkey.astype(key.dtype), dvalue.astype(value.dtype)
    return gradients.dquery, *dkeys, gradients.dsinks, dsink_logits, None, None


attend_both_sides.defvjp(_attend_fwd, _attend_bwd)


def _runs(spec, sides, own, fetched) -> tuple[KeyRun, ...]:
    """The keys in their order, one run for each hop that is given and one for the shard's own."""
    before, after = fetched
    keys = [*reversed(before), own, *after]
    position = spec.first_key - sum(sides.before.lengths[: len(before)])
    runs = []
    for key, value in keys:
        runs.append(KeyRun(key, value, position))
        position += key.shape[1]
    return tuple(runs)


def _sent_home(sides, dkeys) -> tuple[Array, Array]:
    """The gradients of the shard's own keys, those that come back from other devices added."""
    hops = len(sides.before.lengths)
    before, own, after = dkeys[:hops][::-1], dkeys[hops], dkeys[hops + 1 :]
    for hop, found in enumerate(before):
        own = add_last(own, sides.before.give_back(hop, *found))
    for hop, found in enumerate(after):
        own = add_first(own, sides.after.give_back(hop, *found))
    return own
