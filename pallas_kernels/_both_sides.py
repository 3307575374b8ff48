"""The differentiable attention of one shard whose queries see keys after themselves.

Only the first and the last rows see a short halo. The rows between them go first, in two launches:
the keys before the shard arrive under the first one, the keys after it under the second one. Then
come the first rows, and the last rows (`_rows_between_first`).

With long halos, and in the backward pass, one launch takes the halos of both sides and the shard's
own keys. The halos are kept for the backward pass. Gradients of several hops travel and add up in
the accumulator's precision.
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


class _Fetched(NamedTuple):
    """The keys and values of hops of both sides, those of each side from the nearest on."""

    before: list[KeyValue]
    after: list[KeyValue]


class _Residuals(NamedTuple):
    """What the backward pass needs; attributes as the arguments of `attend_both_sides`."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K Hv"]
    sinks: SinkRun | None
    sink_logits: Float[Array, "N"] | None
    start: Starts
    end: Ends
    fetched: _Fetched
    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B N T"]


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

    Takes what `attend` takes, but instead of a halo ``sides``, how keys before and after the shard
    arrive; and ``end``, where each query's sequence ends, relative to the shard, or None where no
    key behind it is here.
    """
    arrays = (query, key, value, sinks, sink_logits, start, end)
    return _attend_fwd(spec, sides, implementation, *arrays)[0]


def _attend_fwd(
    spec: Spec, sides: Sides, implementation: str, *arrays: Any
) -> tuple[Float[Array, "B T N Hv"], _Residuals]:
    query, key, value, sinks, sink_logits, start, end = arrays
    learned = learned_sinks(sink_logits, query)
    own = KeyRun(key, value, spec.first_key)
    inputs = ForwardInputs(query, (own,), sinks, learned, *spec.moved(start, end))
    state, fetched = _forward(spec, sides, implementation, inputs, start)
    out = checkpoint_name(vary_as(query, state.out), "context")
    lse = checkpoint_name(vary_as(query, state.lse), "context")
    return out, _Residuals(query, key, value, sinks, sink_logits, start, end, fetched, out, lse)


def _forward(
    spec: Spec, sides: Sides, implementation: str, inputs: ForwardInputs, start: Starts
) -> tuple[State, _Fetched]:
    """The state of all rows, and the fetched keys of both sides.

    ``start`` is relative to the shard, for the halos.
    """
    kernels = _implementations.kernels_of(implementation)
    (own,), rows = inputs.runs, inputs.query.shape[1]
    launch = partial(launch_forward, spec, kernels, out_dtype=inputs.query.dtype)
    tile = kernels.query_tile_rows(spec, inputs.query, own)
    begin, stop = _rows_without_halo(sides, rows, tile)
    has_halos = any(sides.before.lengths) or any(sides.after.lengths)
    few_rows_see_halos = 2 * (begin + rows - stop) <= rows
    if kernels.prefers_fused_halo_forward or not has_halos or not few_rows_see_halos:
        fetched = _Fetched(
            _fetch_hops(sides.before, own, start), _fetch_hops(sides.after, own, start)
        )
        joined = inputs._replace(runs=_runs(spec, sides, own, fetched))
        return launch(joined, None, rows=(0, rows)), fetched
    return _rows_between_first(spec, launch, sides, inputs, start, (begin, stop), tile)


def _rows_without_halo(sides: Sides, rows: int, tile: int) -> tuple[int, int]:
    """The rows that see no key of either halo, in whole tiles, as a half-open range."""
    begin = pl.cdiv(sum(sides.before.lengths), tile) * tile
    stop = (rows - sum(sides.after.lengths)) // tile * tile if any(sides.after.lengths) else rows
    return begin, stop


def _rows_between_first(
    spec: Spec,
    launch: Callable[..., State],
    sides: Sides,
    inputs: ForwardInputs,
    start: Starts,
    between: tuple[int, int],
    tile: int,
) -> tuple[State, _Fetched]:
    """The rows that see no halo while the halos travel; then the first rows, and the last ones.

    Of several messages at once XLA lets only the last travel under a kernel. So each one has a
    launch of its own to travel under. Under that of the first rows, on four H100 with a window of
    (512, 512), the second message took most of its time when that launch was over. So the rows
    between are two launches.

    Args:
        spec: static settings.
        launch: `launch_forward` by a backend.
        sides: the halos.
        inputs: with the shard's own keys.
        start: where each query's sequence starts, relative to the shard.
        between: the rows that see no halo.
        tile: rows of a tile of queries.
    """
    (own,), rows, (begin, stop) = inputs.runs, inputs.query.shape[1], between

    def with_hops(before, after):
        return inputs._replace(runs=_runs(spec, sides, own, _Fetched(list(before), list(after))))

    before = _fetch_hops(sides.before, own, start)
    half = stop
    if before and sides.after.lengths:
        half = begin + pl.cdiv(stop - begin, 2 * tile) * tile
    state = launch(inputs, None, rows=(begin, half))
    under_first = under_second = partial(only_after, state.lse, begin)
    after = _fetch_hops(sides.after, own, start, state.lse[0, 0, begin] if before else None)
    if half < stop:
        state = launch(inputs, state, rows=(half, stop))
        under_second = partial(only_after, state.lse, half)
    if before:
        state = launch(with_hops(map(under_first, before), []), state, rows=(0, begin))
    if after:
        state = launch(with_hops([], map(under_second, after)), state, rows=(stop, rows))
    return state, _Fetched(before, after)


def _fetch_hops(
    halo: Halo, own: KeyRun, start: Starts, after: Float[Array, ""] | None = None
) -> list[KeyValue]:
    """All hops of a halo, sent once the number ``after`` exists."""
    hops = range(len(halo.lengths))
    return [halo.fetch(hop, own.key, own.value, start, after=after) for hop in hops]


def _attend_bwd(
    spec: Spec,
    sides: Sides,
    implementation: str,
    residuals: _Residuals,
    dout: Float[Array, "B T N Hv"],
) -> tuple:
    query, key, value, sinks, sink_logits, start, end, fetched, out, lse = residuals
    start, end = spec.moved(start, end)
    runs = _runs(spec, sides, KeyRun(key, value, spec.first_key), fetched)
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
    dsink_logits = sink_logits_gradient(sink_logits, lse, gradients.delta)
    dkeys = dkey.astype(key.dtype), dvalue.astype(value.dtype)
    return gradients.dquery, *dkeys, gradients.dsinks, dsink_logits, None, None


attend_both_sides.defvjp(_attend_fwd, _attend_bwd)


def _runs(spec: Spec, sides: Sides, own: KeyRun, fetched: _Fetched) -> tuple[KeyRun, ...]:
    """The keys in their order, one run for each hop that is given and one for the shard's own."""
    before, after = fetched
    keys = [*reversed(before), (own.key, own.value), *after]
    position = spec.first_key - sum(sides.before.lengths[: len(before)])
    runs = []
    for key, value in keys:
        runs.append(KeyRun(key, value, position))
        position += key.shape[1]
    return tuple(runs)


def _sent_home(sides: Sides, dkeys: tuple[KeyValue, ...]) -> KeyValue:
    """The gradients of the shard's own keys, those that come back from other devices added.

    ``dkeys`` are those of the runs, in their order.
    """
    hops = len(sides.before.lengths)
    before, own, after = dkeys[:hops][::-1], dkeys[hops], dkeys[hops + 1 :]
    for hop, found in enumerate(before):
        own = add_last(own, sides.before.give_back(hop, *found))
    for hop, found in enumerate(after):
        own = add_first(own, sides.after.give_back(hop, *found))
    return own
