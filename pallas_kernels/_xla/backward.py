"""Backward pass in plain XLA: it recomputes the softmax from the log-sum-exp over all keys."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels._kernels import BackwardInputs, Gradients
from pallas_kernels._masks import is_real
from pallas_kernels._order import exists
from pallas_kernels._spec import KeyRun, SinkRun, Spec
from pallas_kernels._varying import full_like_varying
from pallas_kernels._xla.arrays import (
    Bounds,
    group,
    group_rows,
    heads_first,
    joined,
    put_rows,
    rows_first,
    split_by_runs,
    take_rows,
    without_padding,
)
from pallas_kernels._xla.products import dot, scaled_logits
from pallas_kernels._xla.tiles import KeyTile, QueryTile, TileLoop, by_rows

# Gradients of all queries, and of all keys and values of a run.
_Sums = tuple[Float[Array, "B R K G H"], Float[Array, "B run K H"], Float[Array, "B run K Hv"]]


# The jit is for eager calls, and for the passes of one program that are traced more than once.
@partial(jax.jit, static_argnames=("spec", "rows", "dquery_dtype", "dkey_dtype"), inline=True)
def backward(
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R0 N H"] | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype | None,
    dkey_dtype: jnp.dtype,
) -> Gradients:
    """As `Kernels.backward`."""
    query, dout, lse = inputs.query, inputs.dout, inputs.lse
    run, bounds = joined(inputs.runs), Bounds(inputs.start, inputs.end)
    delta = inputs.delta_of(rows)
    dquery_dtype = lse.dtype if dquery_dtype is None else dquery_dtype
    if bounds.packed:
        end = None if bounds.end is None else bounds.end[:, :rows]
        real = is_real(jnp.arange(rows, dtype=jnp.int32)[None], bounds.start[:, :rows], end)
        delta = jnp.where(real[:, None], delta, 0)
    if dquery is not None:
        dquery = jnp.pad(dquery, ((0, 0), (0, rows - dquery.shape[1]), (0, 0), (0, 0)))
    arrays = (query, run, inputs.sinks, dout, lse, delta, dquery)
    found = by_rows(spec, partial(_gradients, spec, rows), bounds, *arrays)
    dquery, dkey, dvalue, dsinks = found
    dkeys = split_by_runs(inputs.runs, dkey.astype(dkey_dtype), dvalue.astype(dkey_dtype))
    return Gradients(dquery.astype(dquery_dtype), dkeys, dsinks, delta)


def _gradients(
    spec: Spec,
    rows: int,
    bounds: Bounds,
    query: Float[Array, "B T N H"],
    run: KeyRun,
    sinks: SinkRun | None,
    dout: Float[Array, "B T N Hv"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N R"],
    initial_dquery: Float[Array, "B R N H"] | None,
) -> tuple[Array, Array, Array, SinkRun | None]:
    """(dquery, dkey, dvalue, dsinks) in the accumulator's dtype."""
    key, value = without_padding(spec, run.offset, bounds, (run.key, run.value))
    # The rows of queries are those of the shard's own keys.
    query, dout = without_padding(spec, spec.first_key, bounds, (query, dout))
    loop = TileLoop.of(spec, (0, rows), bounds, KeyRun(key, value, run.offset))
    num_kv, dtype = key.shape[2], lse.dtype
    query, dout = group(query, num_kv), group(dout, num_kv)
    lse, delta = group_rows(lse, num_kv), group_rows(delta, num_kv)

    def query_tile(tile, sums):
        queries = _Queries(
            heads_first(tile.rows_of(query)),
            heads_first(tile.rows_of(dout)),
            tile.rows_of(lse, axis=3),
            tile.rows_of(delta, axis=3),
        )
        step = partial(_add_gradients, spec, tile, queries)
        dquery, dkey, dvalue, dsinks = sums
        dquery, dkey, dvalue = loop.over_keys(tile, step, (dquery, dkey, dvalue))
        if sinks is not None:
            dquery, *dsinks = step(loop.fetched_sinks(sinks, tile), (dquery, *dsinks))
            dsinks = SinkRun(*dsinks)
        return dquery, dkey, dvalue, dsinks

    if initial_dquery is None:
        dquery = full_like_varying(query, (*query.shape[:1], rows, *query.shape[2:]), 0, dtype)
    else:
        dquery = group(initial_dquery, num_kv)
    dsinks = None if sinks is None else SinkRun(*_zeros(sinks, dtype))
    initial = (dquery, *_zeros((key, value), dtype), dsinks)
    dquery, dkey, dvalue, dsinks = loop.over_queries(query_tile, initial)
    return dquery.reshape(*dquery.shape[:2], -1, dquery.shape[-1]), dkey, dvalue, dsinks


def _zeros(arrays: tuple[Array, ...], dtype) -> list[Array]:
    """Zeros like the arrays, which wait for the first one.

    Else those of all hops of a halo may be made, and kept, at the start of the program.
    """
    zero = jnp.where(exists(arrays[0].reshape(-1)[0]), 0, 1).astype(dtype)
    return [jnp.broadcast_to(zero, x.shape) for x in arrays]


class _Queries(NamedTuple):
    """A tile of queries, and what belongs to them."""

    query: Float[Array, "B K GQ H"]
    dout: Float[Array, "B K GQ Hv"]
    lse: Float[Array, "B K G Q"]
    delta: Float[Array, "B K G Q"]


def _add_gradients(
    spec: Spec, tile: QueryTile, queries: _Queries, keys: KeyTile, sums: _Sums
) -> _Sums:
    """Adds what flows through one pair of tiles."""
    dquery, dkey, dvalue = sums
    query, dout, lse, delta = queries
    groups, dtype = lse.shape[2], lse.dtype
    logits, dcap = scaled_logits(spec, query, keys.key, groups, dtype)
    # Where a query's log-sum-exp is -inf, it sees no key.
    weights = jnp.exp(jnp.where(keys.seen, logits - lse[..., None], -jnp.inf))
    dweights = dot(spec, "bkqv,bskv->bkqs", dout, keys.value, dtype).reshape(logits.shape)
    dlogits = weights * (dweights - delta[..., None]) * spec.scale
    dlogits = dlogits if dcap is None else dlogits * dcap

    def matrix(x, like):
        return x.astype(like.dtype).reshape(*query.shape[:3], -1)

    dlogits, weights = matrix(dlogits, keys.key), matrix(weights, keys.value)
    dquery_part = dot(spec, "bkqs,bskh->bkqh", dlogits, keys.key, dtype)
    return (
        _add_rows(dquery, rows_first(dquery_part, groups), tile.begin),
        _add_rows(dkey, dot(spec, "bkqs,bkqh->bskh", dlogits, query, dtype), keys.begin),
        _add_rows(dvalue, dot(spec, "bkqs,bkqv->bskv", weights, dout, dtype), keys.begin),
    )


def _add_rows(
    total: Float[Array, "B S *heads"], part: Float[Array, "B s *heads"], begin: Int[Array, ""] | int
) -> Float[Array, "B S *heads"]:
    return put_rows(total, take_rows(total, begin, part.shape[1], 1) + part, begin, 1)
