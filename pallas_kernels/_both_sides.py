"""The differentiable attention of one shard whose queries see keys after themselves.

Short halos are seen by few rows, the first and the last. The other rows go first, under the
permutes, then the first rows and then the last ones, each with all their keys. With long halos, and
in the backward pass, the halos of both sides and the shard's own keys go through one launch. The
halos are kept for the backward pass. Gradients of several hops travel and add up in the
accumulator's precision.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float

from pallas_kernels import _implementations
from pallas_kernels._halo import Halo, add_first, add_last
from pallas_kernels._kernels import BackwardInputs, ForwardInputs
from pallas_kernels._launches import launch_backward, launch_forward, sink_logits_gradient
from pallas_kernels._spec import Ends, KeyRun, SinkRun, Spec, Starts, State, accumulator_dtype
from pallas_kernels._varying import vary_as


class Sides(NamedTuple):
    """The keys before the shard and those after it, which other devices hold.

    ``after`` is the mirror image of ``before``: its hop c begins just behind its hop c - 1.
    """

    before: Halo
    after: Halo


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
    fetched = tuple(
        [halo.fetch(hop, key, value, start, after=None) for hop in range(len(halo.lengths))]
        for halo in sides
    )
    learned = None
    if sink_logits is not None:
        shape = (query.shape[0], query.shape[2])
        learned = jnp.broadcast_to(sink_logits, shape).astype(accumulator_dtype(query.dtype))
    runs = _runs(spec, sides, (key, value), fetched)
    inputs = ForwardInputs(query, runs, sinks, learned, *spec.moved(start, end))
    state = _launch_all_forward(spec, sides, implementation, inputs)
    # Mosaic GPU's kernels know nothing of manual mesh axes.
    out = checkpoint_name(vary_as(query, state.out), "context")
    lse = checkpoint_name(vary_as(query, state.lse), "context")
    return out, (query, key, value, sinks, sink_logits, start, end, fetched, out, lse)


def _launch_all_forward(
    spec: Spec, sides: Sides, implementation: str, inputs: ForwardInputs
) -> State:
    kernels = _implementations.kernels_of(implementation)
    rows, dtype = inputs.query.shape[1], inputs.query.dtype
    launch = partial(launch_forward, spec, kernels, out_dtype=dtype)
    before, own, after = _by_side(sides, inputs.runs)
    tile = kernels.query_tile_rows(spec, inputs.query, own)
    begin = pl.cdiv(sum(sides.before.lengths), tile) * tile
    stop = (rows - sum(sides.after.lengths)) // tile * tile
    few_rows_see_halos = 2 * (begin + rows - stop) <= rows
    if kernels.prefers_fused_halo_forward or not (before or after) or not few_rows_see_halos:
        return launch(inputs, None, rows=(0, rows))

    state = launch(inputs._replace(runs=(own,)), None, rows=(begin, stop))
    # The rows that need a halo come after this launch: the transfers overlap with it.
    done = state.lse[0, 0, begin] <= jnp.inf  # True, but no compiler may assume it
    before, after = ([_once(done, run) for run in runs] for runs in (before, after))
    if before:
        state = launch(inputs._replace(runs=(*before, own)), state, rows=(0, begin))
    if after:
        state = launch(inputs._replace(runs=(own, *after)), state, rows=(stop, rows))
    return state


def _once(done: Bool[Array, ""], run: KeyRun) -> KeyRun:
    """The run, but only once ``done``, which is true, has been computed."""
    key, value = (jnp.where(done, x, jnp.nan) for x in (run.key, run.value))
    return KeyRun(key, value, run.offset)


def _by_side(sides: Sides, runs: tuple[KeyRun, ...]) -> tuple[list[KeyRun], KeyRun, list[KeyRun]]:
    """(runs before the shard, its own keys, runs after the shard)."""
    hops = len(sides.before.lengths)
    return list(runs[:hops]), runs[hops], list(runs[hops + 1 :])


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
    """All keys in their order, one run for each hop and one for the shard's own."""
    before, after = fetched
    keys = [*reversed(before), own, *after]
    position, runs = spec.first_key - sum(sides.before.lengths), []
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
