"""Forward pass in plain XLA: an online softmax over the keys that a tile of queries sees."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels._kernels import ForwardInputs
from pallas_kernels._spec import KeyRun, SinkRun, Spec, State, accumulator_dtype
from pallas_kernels._varying import full_like_varying
from pallas_kernels._xla.arrays import (
    Bounds,
    group,
    group_rows,
    heads_first,
    joined,
    without_padding,
)
from pallas_kernels._xla.products import dot, scaled_logits
from pallas_kernels._xla.tiles import KeyTile, TileLoop, by_rows

# Weighted values, running maximum and running sum of the online softmax.
_Sums = tuple[Float[Array, "B K G Q Hv"], Float[Array, "B K G Q"], Float[Array, "B K G Q"]]


# The jit is for eager calls, and for the passes of one program that are traced more than once.
@partial(jax.jit, static_argnames=("spec", "rows", "resume", "out_dtype"), inline=True)
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
    query, run = inputs.query, joined(inputs.runs)
    if state is None:
        batch, length, heads, _ = query.shape
        out_shape = (batch, length, heads, run.value.shape[-1])
        state = State(
            full_like_varying(query, out_shape, 0, out_dtype),
            full_like_varying(query, (batch, heads, length), 0, accumulator_dtype(query.dtype)),
        )
    bounds = Bounds(inputs.start, inputs.end)
    attend = partial(_attend, spec, rows, resume)
    arrays = (query, run, inputs.sinks, inputs.sink_logits, state)
    return by_rows(spec, attend, bounds, *arrays)


def _attend(
    spec: Spec,
    rows: tuple[int, int],
    resume: bool,
    bounds: Bounds,
    query: Float[Array, "B T N H"],
    run: KeyRun,
    sinks: SinkRun | None,
    sink_logits: Float[Array, "B N"] | None,
    state: State,
) -> State:
    """The new state, with a loop over tiles of queries."""
    key, value = without_padding(spec, run.offset, bounds, (run.key, run.value))
    loop = TileLoop.of(spec, rows, bounds, KeyRun(key, value, run.offset))
    num_kv, dtype = key.shape[2], accumulator_dtype(query.dtype)
    query = group(query, num_kv)

    def query_tile(tile, state):
        out, lse = state
        rows_of_query = tile.rows_of(query)
        if resume:
            sums = _resumed_sums(tile.rows_of(out), tile.rows_of(lse, axis=3), dtype)
        else:
            sums = _initial_sums(rows_of_query, out.shape[-1], sink_logits, dtype)
        step = partial(_softmax_step, spec, heads_first(rows_of_query))
        sums = loop.over_keys(tile, step, sums)
        if sinks is not None:
            sums = step(loop.fetched_sinks(sinks, tile), sums)
        new_out, new_lse = _out_and_lse(sums)
        return tile.put(out, new_out.astype(out.dtype)), tile.put(lse, new_lse, axis=3)

    grouped = (group(state.out, num_kv), group_rows(state.lse, num_kv))
    out, lse = loop.over_queries(query_tile, grouped)
    return State(out.reshape(state.out.shape), lse.reshape(state.lse.shape))


def _initial_sums(
    query: Float[Array, "B Q K G H"], value_dim: int, sink_logits: Float[Array, "B N"] | None, dtype
) -> _Sums:
    """The sums before any key."""
    batch, rows, num_kv, groups, _ = query.shape
    acc = full_like_varying(query, (batch, num_kv, groups, rows, value_dim), 0, dtype)
    if sink_logits is None:
        row_max = full_like_varying(query, acc.shape[:-1], -jnp.inf, dtype)
        return acc, row_max, jnp.zeros_like(row_max)
    sink_logits = sink_logits.reshape(batch, num_kv, groups, 1)
    row_max = jnp.broadcast_to(sink_logits, acc.shape[:-1]).astype(dtype)
    return acc, row_max, jnp.ones_like(row_max)


def _resumed_sums(out: Float[Array, "B Q K G Hv"], lse: Float[Array, "B K G Q"], dtype) -> _Sums:
    """The sums of the launches before, from a tile of queries' output and log-sum-exp."""
    return (
        jnp.moveaxis(out, 1, 3).astype(dtype),
        lse,
        jnp.where(lse == -jnp.inf, 0, 1).astype(dtype),
    )


def _softmax_step(spec: Spec, query: Float[Array, "B K GQ H"], keys: KeyTile, sums: _Sums) -> _Sums:
    """One step of the online softmax."""
    acc, row_max, row_sum = sums
    groups, dtype = acc.shape[2], acc.dtype
    logits, _ = scaled_logits(spec, query, keys.key, groups, dtype)
    logits = jnp.where(keys.seen, logits, -jnp.inf)
    new_max = jnp.maximum(row_max, logits.max(-1))
    finite_max = jnp.where(new_max == -jnp.inf, 0, new_max)
    rescale = jnp.exp(row_max - finite_max)
    weights = jnp.exp(logits - finite_max[..., None])
    matrix = weights.astype(keys.value.dtype).reshape(*query.shape[:3], -1)
    values = dot(spec, "bkqs,bskv->bkqv", matrix, keys.value, dtype).reshape(acc.shape)
    return rescale[..., None] * acc + values, new_max, rescale * row_sum + weights.sum(-1)


def _out_and_lse(sums: _Sums) -> tuple[Float[Array, "B Q K G Hv"], Float[Array, "B K G Q"]]:
    """Output and log-sum-exp of a tile of queries; zeros and -inf for a query without keys."""
    acc, row_max, row_sum = sums
    has_keys = row_sum > 0
    row_sum = jnp.where(has_keys, row_sum, 1)
    out = jnp.moveaxis(acc / row_sum[..., None], 3, 1)  # 0 / 1 without keys
    return out, jnp.where(has_keys, row_max + jnp.log(row_sum), -jnp.inf)
