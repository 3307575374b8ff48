"""Gradients through sinks that windows do not reach: the arrays around `sinks_kernel`.

The kernel takes the queries in chunks. Here the sinks of each chunk are gathered, and the gradients
of sinks that the chunks leave are added up in a fixed order: to those of the shard's own keys, and
of the fetched sinks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Float32, Int

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqSums
from pallas_kernels._mosaic_gpu.backward.sinks_kernel import backward_by_chunks, chunk_length
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts, plus

MAX_SINKS = ROWS
"""Sinks of a sequence at most: a tile."""


SHORTEST_WINDOW = ROWS - 1
"""A chunk, which is no longer than a window, has at least a tile of queries."""


def takes(spec: Spec) -> bool:
    """Whether the kernel can compute this."""
    window = spec.keys_before
    has_chunks = window is not None and window >= SHORTEST_WINDOW
    return has_chunks and spec.num_sinks <= MAX_SINKS


def has_sinks_beyond_window(spec: Spec, runs: tuple[KeyRun, ...], sinks: SinkRun | None) -> bool:
    """Whether queries may see sinks that their windows do not reach."""
    own_sinks = any(spec.sinks_in(run.offset) > 0 for run in runs)
    return spec.window is not None and (sinks is not None or own_sinks)


def backward(
    spec: Spec,
    queries: Queries,
    run: KeyRun,
    sinks: SinkRun | None,
    sums: DqSums,
    dquery: Float32[Array, "B R0 N H"] | None,
    dkey: Float32[Array, "B S K H"],
    dvalue: Float32[Array, "B S K Hv"],
    *,
    dquery_dtype: jnp.dtype,
) -> tuple[
    Float[Array, "B T N H"],
    Float32[Array, "B S K H"],
    Float32[Array, "B S K Hv"],
    SinkRun | None,
]:
    """Adds what flows through the sinks that windows do not reach to gradients.

    These sinks are before a query, so that it does not matter whether it sees keys after itself:
    keys are not moved here.

    Args:
        spec: static settings.
        queries: queries of the shard, and what belongs to them.
        run: the shard's own keys and values.
        sinks: sinks fetched from other shards, or None.
        sums: gradients of queries through the keys in their windows.
        dquery: gradients of the first queries through keys of other launches, or None.
        dkey: gradients of the shard's keys through windows.
        dvalue: those of its values.
        dquery_dtype: of the returned gradients of queries.

    Returns:
        dquery, dkey, dvalue, and the gradients of the fetched sinks.
    """
    start = plus(queries.start, spec.lookahead)
    queries = queries._replace(start=start, end=None)
    spec = dataclasses.replace(spec, window=spec.keys_before, lookahead=0)
    assert spec.window is not None
    batch, length = queries.query.shape[:2]
    chunk = chunk_length(spec.window)
    starts = start[:, ::chunk] if start.ndim else start
    starts = jnp.broadcast_to(starts, (batch, pl.cdiv(length, chunk)))
    gathered = sinks_of_chunks(spec.num_sinks, starts, run, sinks, start)
    dquery, *by_query_heads = backward_by_chunks(
        spec, queries, gathered, starts, sums, dquery, dquery_dtype, fetched=sinks is not None
    )

    dkey_of_chunks, dvalue_of_chunks = (
        _by_kv_heads(x, spec.num_sinks, run.key.shape[2]) for x in by_query_heads
    )
    dkey = add_to_own(dkey, dkey_of_chunks, starts, chunk)
    dvalue = add_to_own(dvalue, dvalue_of_chunks, starts, chunk)
    dsinks = None
    if sinks is not None:
        dsinks = SinkRun(
            sum_of_fetched(dkey_of_chunks, starts), sum_of_fetched(dvalue_of_chunks, starts)
        )
    return dquery, dkey, dvalue, dsinks


def _by_kv_heads(
    by_query_heads: Float32[Array, "B chunks N rows H"], num_sinks: int, num_kv_heads: int
) -> Float32[Array, "B chunks sinks K H"]:
    """Gradients of sinks, summed over the query heads that share a head of keys."""
    x = by_query_heads[..., :num_sinks, :]
    group_size = x.shape[2] // num_kv_heads
    x = x.reshape(*x.shape[:2], num_kv_heads, group_size, *x.shape[3:]).sum(3)
    return jnp.moveaxis(x, 3, 2)


def sinks_of_chunks(
    num_sinks: int,
    starts: Int[Array, "B chunks"],
    run: KeyRun,
    sinks: SinkRun | None,
    start: Starts,
) -> tuple[Float[Array, "B chunks K 64 H"], Float[Array, "B chunks K 64 Hv"]]:
    """Keys and values of the sinks of the sequences at ``starts``; zeros where there is no sink.

    ``start`` is that of each query of the shard, which tells padding: a sequence may have fewer
    tokens than there are sinks.
    """
    slots = jnp.arange(ROWS, dtype=jnp.int32)
    positions = starts[..., None] + slots
    length = run.key.shape[1]
    own = (slots < num_sinks) & (positions >= 0) & (positions < length)
    if start.ndim:
        row_start = jax.vmap(lambda x, n: x[n])(start, jnp.clip(positions, 0, length - 1))
        own &= row_start <= positions

    def gather(x, fetched):
        rows = jnp.clip(positions, 0, length - 1)
        result = jnp.where(own[..., None, None], jax.vmap(lambda x, n: x[n])(x, rows), 0)
        if fetched is not None:
            before = (positions < 0) & (slots < fetched.shape[1])
            pad = ((0, 0), (0, max(0, ROWS - fetched.shape[1])), (0, 0), (0, 0))
            # Fetched sinks hold values of the keys' dtype, so this cast loses nothing.
            fetched = jnp.pad(fetched.astype(x.dtype), pad)[:, None, :ROWS]
            result = jnp.where(before[..., None, None], fetched, result)
        return jnp.moveaxis(result, 3, 2)

    key, value = (None, None) if sinks is None else sinks
    return gather(run.key, key), gather(run.value, value)


def add_to_own(
    gradients: Float[Array, "B S K H"],
    by_chunks: Float[Array, "B chunks sinks K H"],
    starts: Int[Array, "B chunks"],
    chunk: int,
) -> Float[Array, "B S K H"]:
    """Adds gradients of the sinks that are the shard's own keys to the gradients of these keys.

    Args:
        gradients: of keys or values.
        by_chunks: gradients of the sinks of each chunk's sequence; zeros for sinks that no query of
            the chunk sees beyond its window.
        starts: where this sequence starts.
        chunk: queries of a chunk.
    """
    batch, chunks, num_sinks = by_chunks.shape[:3]
    length = gradients.shape[1]

    def add(earlier, later):
        start, total = earlier
        same = start == later[0]
        return later[0], jnp.where(same[..., None, None, None], total + later[1], later[1])

    # The last chunk of each sequence gets the sum over all of its chunks.
    _, totals = lax.associative_scan(add, (starts, by_chunks), axis=1)
    is_last = jnp.concatenate((starts[:, 1:] != starts[:, :-1], jnp.ones((batch, 1), bool)), axis=1)
    positions = starts[..., None] + jnp.arange(num_sinks, dtype=jnp.int32)
    # Sinks that are seen beyond a window stand before the chunk, so that these rows differ.
    first = jnp.arange(chunks, dtype=jnp.int32)[:, None] * chunk
    is_own = is_last[..., None] & (positions >= 0) & (positions < first)
    # Other sums go to rows beyond the keys, which are dropped; all rows must differ.
    dropped = length + jnp.arange(chunks * num_sinks, dtype=jnp.int32)
    rows = jnp.where(is_own.reshape(batch, -1), positions.reshape(batch, -1), dropped)
    totals = totals.reshape(batch, chunks * num_sinks, *by_chunks.shape[3:])

    def add_to_rows(x, rows, totals):
        return x.at[rows].add(totals, mode="drop", unique_indices=True)

    return jax.vmap(add_to_rows)(gradients, rows, totals)


def sum_of_fetched(
    by_chunks: Float[Array, "B chunks sinks K H"], starts: Int[Array, "B chunks"]
) -> Float[Array, "B sinks K H"]:
    """Gradients of the fetched sinks, summed over chunks; arguments as those of `add_to_own`."""
    slots = jnp.arange(by_chunks.shape[2], dtype=jnp.int32)
    fetched = (starts == starts[:, :1])[..., None] & (starts[..., None] + slots < 0)
    return jnp.where(fetched[..., None, None], by_chunks, 0).sum(1)
