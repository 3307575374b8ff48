"""Forward pass in plain XLA: an online softmax over the keys that a tile of queries sees."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from pallas_kernels._kernels import ForwardInputs
from pallas_kernels._spec import SinkRun, Spec, State, accumulator_dtype
from pallas_kernels._varying import full_like_varying
from pallas_kernels._xla.arrays import Bounds, each_row, group, group_rows, joined, without_padding
from pallas_kernels._xla.products import dot, scaled_logits
from pallas_kernels._xla.tiles import KeyLoop, KeyTile, key_plans

# Weighted values, running maximum and running sum of the online softmax.
_Sums = tuple[Float[Array, "K G Q Hv"], Float[Array, "K G Q"], Float[Array, "K G Q"]]


def forward(
    spec: Spec,
    inputs: ForwardInputs,
    state: State | None,
    *,
    rows: tuple[int, int],
    resume: bool,
    out_dtype: jnp.dtype,
) -> State:
    """As `Kernels.forward`."""
    query, sinks, sink_logits = inputs.query, inputs.sinks, inputs.sink_logits
    runs = joined(inputs.runs)
    if state is None:
        batch, length, heads, _ = query.shape
        out_shape = (batch, length, heads, runs[0].value.shape[-1])
        state = State(
            full_like_varying(query, out_shape, 0, out_dtype),
            full_like_varying(query, (batch, heads, length), 0, accumulator_dtype(query.dtype)),
        )
    sequences = Bounds(inputs.start, inputs.end)
    bounds = (sequences, key_plans(spec, runs, sequences, rows))
    keys = tuple((run.key, run.value) for run in runs)
    one_row = partial(_one_row, spec, tuple(run.offset for run in runs), rows, resume)
    return State(*each_row(one_row, bounds)(query, keys, sinks, sink_logits, *state))


def _one_row(
    spec: Spec,
    offsets: tuple[int, ...],
    rows: tuple[int, int],
    resume: bool,
    bounds: tuple[Bounds, tuple[Int[Array, "tiles 6"], ...]],
    query: Float[Array, "T N H"],
    keys: tuple[tuple[Array, Array], ...],
    sinks: SinkRun | None,
    sink_logits: Float[Array, "N"] | None,
    out: Float[Array, "T N Hv"],
    lse: Float[Array, "N T"],
) -> tuple[Float[Array, "T N Hv"], Float[Array, "N T"]]:
    """Output and log-sum-exp of one row of the batch."""
    sequences, plans = bounds
    loop = KeyLoop(spec, rows, sequences, offsets, plans)
    keys = without_padding(spec, keys, offsets, sequences)
    num_kv, dtype = keys[0][0].shape[1], accumulator_dtype(query.dtype)
    grouped_query = group(query, num_kv)

    def query_tile(t, state):
        out_so_far, lse_so_far = state
        tile = loop.query_tile(t)
        query = tile.rows_of(grouped_query)
        before = tile.rows_of(out_so_far), tile.rows_of(lse_so_far, axis=2)
        if resume:
            sums = _resumed_sums(*before, dtype)
        else:
            sums = _initial_sums(query, out.shape[-1], sink_logits, dtype)
        step = partial(_softmax_step, spec, query)
        for n, key_value in enumerate(keys):
            sums = loop.over_run(n, key_value, tile, step, sums)
        if sinks is not None:
            sums = step(loop.fetched_sinks(sinks, tile), sums)
        new_out, new_lse = _out_and_lse(sums)
        return (
            tile.put(out_so_far, new_out.astype(out.dtype), before[0]),
            tile.put(lse_so_far, new_lse, before[1], axis=2),
        )

    state = (group(out, num_kv), group_rows(lse, num_kv))
    new_out, new_lse = lax.fori_loop(0, loop.num_query_tiles, query_tile, state)
    return new_out.reshape(out.shape), new_lse.reshape(lse.shape)


def _initial_sums(
    query: Float[Array, "Q K G H"], value_dim: int, sink_logits: Float[Array, "N"] | None, dtype
) -> _Sums:
    """The sums before any key."""
    rows, num_kv, groups, _ = query.shape
    acc = full_like_varying(query, (num_kv, groups, rows, value_dim), 0, dtype)
    if sink_logits is None:
        row_max = full_like_varying(query, acc.shape[:-1], -jnp.inf, dtype)
        return acc, row_max, jnp.zeros_like(row_max)
    row_max = jnp.broadcast_to(sink_logits.reshape(num_kv, groups, 1), acc.shape[:-1]).astype(dtype)
    return acc, row_max, jnp.ones_like(row_max)


def _resumed_sums(out: Float[Array, "Q K G Hv"], lse: Float[Array, "K G Q"], dtype) -> _Sums:
    """The sums of the launches before, from a tile of queries' output and log-sum-exp."""
    return (
        jnp.moveaxis(out, 0, 2).astype(dtype),
        lse,
        jnp.where(lse == -jnp.inf, 0, 1).astype(dtype),
    )


def _softmax_step(spec: Spec, query: Float[Array, "Q K G H"], keys: KeyTile, sums: _Sums) -> _Sums:
    """One step of the online softmax."""
    acc, row_max, row_sum = sums
    logits, _ = scaled_logits(spec, query, keys.key, acc.dtype)
    logits = jnp.where(keys.seen, logits, -jnp.inf)
    new_max = jnp.maximum(row_max, logits.max(-1))
    finite_max = jnp.where(new_max == -jnp.inf, 0, new_max)
    rescale = jnp.exp(row_max - finite_max)
    weights = jnp.exp(logits - finite_max[..., None])
    values = dot(spec, "kgqs,skv->kgqv", weights.astype(keys.value.dtype), keys.value, acc.dtype)
    return rescale[..., None] * acc + values, new_max, rescale * row_sum + weights.sum(-1)


def _out_and_lse(sums: _Sums) -> tuple[Float[Array, "Q K G Hv"], Float[Array, "K G Q"]]:
    """Output and log-sum-exp of a tile of queries; zeros and -inf for a query without keys."""
    acc, row_max, row_sum = sums
    has_keys = row_sum > 0
    row_sum = jnp.where(has_keys, row_sum, 1)
    out = jnp.moveaxis(jnp.where(has_keys, 1 / row_sum, 0)[..., None] * acc, 2, 0)
    return out, jnp.where(has_keys, row_max + jnp.log(row_sum), -jnp.inf)
