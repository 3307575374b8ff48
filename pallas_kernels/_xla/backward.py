"""Backward pass in plain XLA: it recomputes the softmax from the log-sum-exp over all keys."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from pallas_kernels._kernels import BackwardInputs, Gradients
from pallas_kernels._logits import delta_of
from pallas_kernels._masks import is_real
from pallas_kernels._slices import slice_in_dim, update_in_dim
from pallas_kernels._spec import SinkRun, Spec
from pallas_kernels._varying import full_like_varying
from pallas_kernels._xla.arrays import (
    Bounds,
    each_row,
    group,
    group_rows,
    joined,
    split_by_runs,
    without_padding,
)
from pallas_kernels._xla.products import dot, scaled_logits
from pallas_kernels._xla.tiles import KeyLoop, KeyTile, key_plans

# Gradients of a tile of queries, and of all keys and values of a run.
_Sums = tuple[Float[Array, "Q K G H"], Float[Array, "run K H"], Float[Array, "run K Hv"]]


def backward(
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R0 N H"] | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
) -> Gradients:
    """As `Kernels.backward`."""
    query, sinks, out, dout = inputs.query, inputs.sinks, inputs.out, inputs.dout
    lse, start, runs = inputs.lse, inputs.start, joined(inputs.runs)
    batch, _, heads, dim = query.shape
    delta = delta_of(out[:, :rows], dout[:, :rows], lse.dtype)
    if start.ndim:
        end = None if inputs.end is None else inputs.end[:, :rows]
        real = is_real(jnp.arange(rows, dtype=jnp.int32)[None], start[:, :rows], end)
        delta = jnp.where(real[:, None], delta, 0)
    if dquery is None:
        dquery = full_like_varying(query, (batch, rows, heads, dim), 0, lse.dtype)
    else:
        dquery = jnp.pad(dquery, ((0, 0), (0, rows - dquery.shape[1]), (0, 0), (0, 0)))
    sequences = Bounds(start, inputs.end)
    bounds = (sequences, key_plans(spec, runs, sequences, (0, rows)))
    keys = tuple((run.key, run.value) for run in runs)
    offsets = tuple(run.offset for run in runs)
    one_row = partial(_one_row, spec, offsets, dquery_dtype, dkey_dtype)
    arrays = (query, keys, sinks, dout, lse, delta, dquery)
    dquery, dkeys, dsinks = each_row(one_row, bounds)(*arrays)
    return Gradients(dquery, split_by_runs(inputs.runs, dkeys), dsinks, delta)


def _one_row(
    spec: Spec,
    offsets: tuple[int, ...],
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
    bounds: tuple[Bounds, tuple[Int[Array, "tiles 6"], ...]],
    query: Float[Array, "T N H"],
    keys: tuple[tuple[Array, Array], ...],
    sinks: SinkRun | None,
    dout: Float[Array, "T N Hv"],
    lse: Float[Array, "N T"],
    delta: Float[Array, "N R"],
    dquery: Float[Array, "R N H"],
) -> tuple[Float[Array, "R N H"], tuple[tuple[Array, Array], ...], SinkRun | None]:
    """(dquery, (dkey, dvalue) of each run, dsinks) of one row of the batch."""
    sequences, plans = bounds
    loop = KeyLoop(spec, (0, dquery.shape[0]), sequences, offsets, plans)
    keys = without_padding(spec, keys, offsets, sequences)
    # The rows of queries are those of the shard's own keys.
    ((query, dout),) = without_padding(spec, ((query, dout),), (spec.first_key,), sequences)
    num_kv, dtype = keys[0][0].shape[1], lse.dtype
    query, dout, initial_dquery = (group(x, num_kv) for x in (query, dout, dquery))
    lse, delta = (group_rows(x, num_kv) for x in (lse, delta))

    def query_tile(t, carry):
        dquery, dkeys, dsinks = carry
        tile = loop.query_tile(t)
        dquery_before = tile.rows_of(dquery)
        queries = _Queries(
            tile.rows_of(query),
            tile.rows_of(dout),
            tile.rows_of(lse, axis=2),
            tile.rows_of(delta, axis=2),
        )
        step = partial(_add_gradients, spec, queries)
        dquery_tile, new_dkeys = dquery_before, []
        for n, (key_value, dkey) in enumerate(zip(keys, dkeys, strict=True)):
            dquery_tile, *dkey = loop.over_run(n, key_value, tile, step, (dquery_tile, *dkey))
            new_dkeys.append(tuple(dkey))
        if sinks is not None:
            dquery_tile, *dsinks = step(loop.fetched_sinks(sinks, tile), (dquery_tile, *dsinks))
            dsinks = SinkRun(*dsinks)
        return tile.put(dquery, dquery_tile, dquery_before), tuple(new_dkeys), dsinks

    initial = (
        initial_dquery,
        tuple((_zeros(key, dtype), _zeros(value, dtype)) for key, value in keys),
        None if sinks is None else SinkRun(*(_zeros(x, dtype) for x in sinks)),
    )
    found, dkeys, dsinks = lax.fori_loop(0, loop.num_query_tiles, query_tile, initial)
    dkeys = tuple((dk.astype(dkey_dtype), dv.astype(dkey_dtype)) for dk, dv in dkeys)
    return found.reshape(dquery.shape).astype(dquery_dtype), dkeys, dsinks


def _zeros(x: Float[Array, "..."], dtype) -> Float[Array, "..."]:
    """Zeros that wait for x.

    Else those of all hops of a halo may be made, and kept, at the start of the program.
    """
    one = x.reshape(-1)[0]
    return jnp.broadcast_to(jnp.where(one == one, 0, 1).astype(dtype), x.shape)


class _Queries(NamedTuple):
    """A tile of queries, and what belongs to them."""

    query: Float[Array, "Q K G H"]
    dout: Float[Array, "Q K G Hv"]
    lse: Float[Array, "K G Q"]
    delta: Float[Array, "K G Q"]


def _add_gradients(spec: Spec, queries: _Queries, keys: KeyTile, sums: _Sums) -> _Sums:
    """Adds what flows through one pair of tiles."""
    dquery, dkey, dvalue = sums
    dquery_part, dkey_part, dvalue_part = _gradients(spec, queries, keys)
    return (
        dquery + dquery_part,
        _add_rows(dkey, dkey_part, keys.begin),
        _add_rows(dvalue, dvalue_part, keys.begin),
    )


def _gradients(
    spec: Spec, queries: _Queries, keys: KeyTile
) -> tuple[Float[Array, "Q K G H"], Float[Array, "S K H"], Float[Array, "S K Hv"]]:
    """(dquery, dkey, dvalue) of one pair of tiles."""
    query, dout, lse, delta = queries
    dtype = lse.dtype
    logits, dcap = scaled_logits(spec, query, keys.key, dtype)
    finite_lse = jnp.where(lse == -jnp.inf, 0, lse)[..., None]
    weights = jnp.exp(jnp.where(keys.seen, logits - finite_lse, -jnp.inf))
    dweights = dot(spec, "qkgv,skv->kgqs", dout, keys.value, dtype)
    dlogits = weights * (dweights - delta[..., None]) * spec.scale
    dlogits = (dlogits if dcap is None else dlogits * dcap).astype(keys.key.dtype)
    weights = weights.astype(keys.value.dtype)
    return (
        dot(spec, "kgqs,skh->qkgh", dlogits, keys.key, dtype),
        dot(spec, "kgqs,qkgh->skh", dlogits, query, dtype),
        dot(spec, "kgqs,qkgv->skv", weights, dout, dtype),
    )


def _add_rows(
    total: Float[Array, "S K H"], part: Float[Array, "s K H"], begin: Int[Array, ""] | int
) -> Float[Array, "S K H"]:
    rows = slice_in_dim(total, begin, part.shape[0]) + part
    return update_in_dim(total, rows, begin, 0)
