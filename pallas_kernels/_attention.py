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

from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from pallas_kernels import _implementations
from pallas_kernels._derivatives import first_order
from pallas_kernels._kernels import BackwardInputs, ForwardInputs, Gradients, Kernels
from pallas_kernels._spec import Ends, KeyRun, SinkRun, Spec, Starts, State, accumulator_dtype
from pallas_kernels._varying import vary_as


class Halo(Protocol):
    """Keys before the shard, which other devices hold; hop 0 is the nearest. Hashable.

    ``lengths[c]`` is the number of keys of hop c. The keys of hop c end just before those of
    hop c - 1. Every hop but the last is as long as the shard.
    """

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of keys of each hop."""
        ...

    def fetch(
        self,
        hop: int,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"],
        start: Starts,
        *,
        after: Float[Array, ""] | None,
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """The keys and values of a hop: every shard passes its own, and where its sequences start.

        The message is sent once the number ``after`` exists. The sender sets padding to zero,
        because the receiver does not know which rows are padding.
        """
        ...

    def give_back(
        self, hop: int, dkey: Float[Array, "B S K H"], dvalue: Float[Array, "B S K Hv"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """The transpose of `fetch`.

        Sends a hop's gradients to the device that holds these keys, the last ones of its shard.
        """
        ...


# Keys and values, or their gradients, of one run: each run has a length of its own.
_KeyValue = tuple[Float[Array, "B _ K H"], Float[Array, "B _ K Hv"]]


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
    dtype, rows = lse.dtype, query.shape[1]
    local = KeyRun(key, value, 0)
    travel = dtype if len(halo.lengths) > 1 else key.dtype
    launch = partial(launch_backward, spec, kernels, dkey_dtype=travel)
    inputs = BackwardInputs(query, (local,), sinks, start, out, dout, lse)
    joined = inputs
    if kept is not None:
        joined = inputs._replace(runs=(_hop_run(halo, 0, kept), local))

    if kept is not None and kernels.prefers_fused_halo_backward(spec, joined):
        gradients = launch(joined, None, rows=rows, dquery_dtype=query.dtype)
        home = halo.give_back(0, *gradients.dkeys[0])
    else:
        dquery = home = None
        shared = (key, value, start)
        # The last hop first: the fewest rows see it, so dquery and home only ever grow.
        done: list[Array] = []
        for hop in reversed(range(len(halo.lengths))):
            fetched = _fetch(halo, hop, done, *shared) if kept is None else kept
            of_hop = inputs._replace(runs=(_hop_run(halo, hop, fetched),), sinks=None)
            found = launch(of_hop, dquery, rows=halo.lengths[hop], dquery_dtype=dtype)
            dquery = found.dquery
            home = add_last(halo.give_back(hop, *found.dkeys[0]), home)
            done.append(home[0][0, -1, 0, 0])
        gradients = launch(inputs, dquery, rows=rows, dquery_dtype=query.dtype)
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


def attend_keys(
    spec: Spec,
    implementation: str,
    query: Float[Array, "B T N H"],
    run: KeyRun,
    sink_logits: Float[Array, "N"] | None,
    start: Starts,
    end: Ends,
    state: State | None,
    out_dtype: jnp.dtype,
) -> State:
    """One launch of the forward pass, for a schedule that the caller makes.

    Args:
        spec: static settings.
        implementation: one of ``IMPLEMENTATIONS``, as `choose` returns it.
        query: queries of the shard.
        run: keys that they attend, with the position of the first one relative to the shard.
        sink_logits: learned sinks; they enter the softmax in this launch, so give them to one.
        start: where each query's sequence starts, relative to the shard.
        end: where each query's sequence ends, likewise; None where ``run`` has no key after the
            query but those of its sequence.
        state: attention to the keys of earlier launches, or None.
        out_dtype: of the output; the accumulator's unless this is the only launch.

    Returns:
        Attention to the keys of this launch and of the earlier ones. Mosaic GPU's kernels know
        nothing of manual mesh axes, and take no state that varies over any: after the last
        launch, cast it to vary as the query does.
    """
    batch, rows, heads, _ = query.shape
    if sink_logits is not None:
        dtype = accumulator_dtype(query.dtype)
        sink_logits = jnp.broadcast_to(sink_logits[None], (batch, heads)).astype(dtype)
    inputs = ForwardInputs(
        query, (spec.moved_run(run),), None, sink_logits, *spec.moved(start, end)
    )
    kernels = _implementations.kernels_of(implementation)
    resume = state is not None
    return launch_forward(
        spec, kernels, inputs, state, rows=(0, rows), out_dtype=out_dtype, resume=resume
    )


def attend_keys_backward(
    spec: Spec,
    implementation: str,
    query: Float[Array, "B T N H"],
    run: KeyRun,
    start: Starts,
    end: Ends,
    final: State,
    dout: Float[Array, "B T N Hv"],
    dquery: Float[Array, "B T N H"] | None,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
) -> tuple[Array, Array, Array, Array]:
    """The gradients that flow through the keys of one launch of `attend_keys`.

    Args:
        spec: static settings.
        implementation: one of ``IMPLEMENTATIONS``, as `choose` returns it.
        query: queries of the shard.
        run: keys of this launch.
        start: where each query's sequence starts, relative to the shard.
        end: where each query's sequence ends, as in `attend_keys`.
        final: attention to the keys of all launches, its output in the dtype of ``query``.
        dout: the output's cotangent.
        dquery: gradient of the queries through the keys of other launches, in the accumulator's
            dtype, or None.
        dquery_dtype: of the returned gradient of the queries.
        dkey_dtype: of the returned gradients of keys and values.

    Returns:
        dquery with this launch's part added, dkey, dvalue and ``delta = rowsum(out * dout)``,
        which `sink_logits_gradient` takes.
    """
    start, end = spec.moved(start, end)
    run = spec.moved_run(run)
    inputs = BackwardInputs(query, (run,), None, start, final.out, dout, final.lse, end)
    kernels, rows = _implementations.kernels_of(implementation), query.shape[1]
    dquery, ((dkey, dvalue),), _, delta = launch_backward(
        spec, kernels, inputs, dquery, rows=rows, dquery_dtype=dquery_dtype, dkey_dtype=dkey_dtype
    )
    return dquery, dkey, dvalue, delta


def sink_logits_gradient(
    sink_logits: Float[Array, "N"], lse: Float[Array, "B N T"], delta: Float[Array, "B N T"]
) -> Float[Array, "N"]:
    """A learned sink is a key with the value zero: its logit's gradient is ``-p * delta``."""
    has_keys = lse > -jnp.inf
    learned = sink_logits.astype(lse.dtype)[None, :, None]
    zero = jnp.zeros((), lse.dtype)
    weights = jnp.exp(learned - jnp.where(has_keys, lse, zero))
    weights = jnp.where(has_keys, weights, zero)
    return -(weights * delta).sum((0, 2)).astype(sink_logits.dtype)


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
) -> tuple[State, _KeyValue | None]:
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
) -> tuple[State, _KeyValue | None]:
    batch, rows, heads, _ = query.shape
    dtype = accumulator_dtype(query.dtype)
    lengths = halo.lengths
    local = KeyRun(key, value, 0)
    launch = partial(launch_forward, spec, kernels)
    if sink_logits is not None:
        sink_logits = jnp.broadcast_to(sink_logits, (batch, heads)).astype(dtype)
    inputs = ForwardInputs(query, (local,), sinks, sink_logits, start)
    if not lengths:
        return launch(inputs, None, rows=(0, rows), out_dtype=query.dtype), None

    shared = (key, value, start)
    if len(lengths) == 1 and kernels.prefers_fused_halo_forward:
        fetched = halo.fetch(0, *shared, after=None)
        joined = inputs._replace(runs=(_hop_run(halo, 0, fetched), local))
        return launch(joined, None, rows=(0, rows), out_dtype=query.dtype), fetched

    tile = kernels.query_tile_rows(spec, query, local)
    halo_rows = -(-lengths[0] // tile) * tile  # the rows that see the halo, in whole tiles
    if len(lengths) == 1 and 2 * halo_rows <= rows:
        fetched = halo.fetch(0, *shared, after=None)
        state = launch(inputs, None, rows=(halo_rows, rows), out_dtype=query.dtype)
        # The rows that need the halo come after this launch: the transfer overlaps with it.
        done = state.lse[0, 0, -1] <= jnp.inf  # True, but no compiler may assume it
        late_key, late_value = (jnp.where(done, x, jnp.nan) for x in fetched)
        joined = inputs._replace(runs=(_hop_run(halo, 0, (late_key, late_value)), local))
        state = launch(joined, state, rows=(0, halo_rows), out_dtype=query.dtype)
        return state, fetched

    state = launch(inputs, None, rows=(0, rows), out_dtype=dtype)
    ended: list[Array] = []
    for hop, length in enumerate(lengths):
        fetched = _fetch(halo, hop, ended, *shared)
        of_hop = ForwardInputs(query, (_hop_run(halo, hop, fetched),), None, None, start)
        state = launch(of_hop, state, rows=(0, length), out_dtype=dtype, resume=True)
        ended.append(state.lse[0, 0, 0])
    kept = fetched if len(lengths) == 1 else None
    return State(state.out.astype(query.dtype), state.lse), kept


def add_last(longer: _KeyValue, shorter: _KeyValue | None) -> _KeyValue:
    """Adds keys' gradients to those of the last keys of a longer run."""
    if shorter is None:
        return longer
    (key, value), (last_key, last_value) = longer, shorter
    begin = key.shape[1] - last_key.shape[1]
    if begin == 0:  # as .at[0:] it would crash the compiler of jax 0.11.2, inside shard_map
        return key + last_key, value + last_value
    return key.at[:, begin:].add(last_key), value.at[:, begin:].add(last_value)


def add_first(longer: _KeyValue, shorter: _KeyValue) -> _KeyValue:
    """Adds keys' gradients to those of the first keys of a longer run."""
    (key, value), (first_key, first_value) = longer, shorter
    end = first_key.shape[1]
    if end == key.shape[1]:
        return key + first_key, value + first_value
    return key.at[:, :end].add(first_key), value.at[:, :end].add(first_value)


def _hop_run(halo: Halo, hop: int, fetched: _KeyValue) -> KeyRun:
    key, value = fetched
    return KeyRun(key, value, -sum(halo.lengths[: hop + 1]))


def _fetch(
    halo: Halo,
    hop: int,
    done: list[Array],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    start: Starts,
) -> _KeyValue:
    """Fetches a hop when the hop before the last is done, so that two are in flight."""
    return halo.fetch(hop, key, value, start, after=done[-2] if len(done) > 1 else None)


def launch_forward(
    spec: Spec,
    kernels: Kernels,
    inputs: ForwardInputs,
    state: State | None,
    *,
    rows: tuple[int, int],
    out_dtype: jnp.dtype,
    resume: bool = False,
) -> State:
    """`Kernels.forward`, under vmap and inside other transformations too."""

    def launch(inputs, state):
        return kernels.forward(spec, inputs, state, rows=rows, resume=resume, out_dtype=out_dtype)

    return _differentiable(launch, kernels)(inputs, state)


def launch_backward(
    spec: Spec,
    kernels: Kernels,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R0 N H"] | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
) -> Gradients:
    def launch(inputs, dquery):
        return kernels.backward(
            spec, inputs, dquery, rows=rows, dquery_dtype=dquery_dtype, dkey_dtype=dkey_dtype
        )

    return _differentiable(launch, kernels)(inputs, dquery)


def _differentiable(launch: Callable, kernels: Kernels) -> Callable:
    has_forward_mode = kernels is _implementations.kernels_of("xla")
    return first_order(launch, has_forward_mode=has_forward_mode)
