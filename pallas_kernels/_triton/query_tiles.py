"""Tiles of queries, and what they add to gradients of keys and values.

The kernels of `backward_dkv` and of `backward_sinks` share this.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels._kernels import Queries
from pallas_kernels._logits import cap_logits
from pallas_kernels._masks import is_real
from pallas_kernels._spec import Spec
from pallas_kernels._triton.blocks import (
    Rows,
    bounds_blocks,
    bounds_operands,
    div,
    dot,
    exp2_scaled,
    head_parts,
    inner,
    load_bounds,
    load_rows,
    load_vector,
    log2_sums,
    rem,
)
from pallas_kernels._triton.tiles import TritonTiles

KeySums = tuple[tuple[Array, ...], tuple[Array, ...]]
"""(dkey / scale, dvalue) of a tile of keys, each in head parts; empty where not wanted."""


def query_operands(queries: Queries, group: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and blocks of a group of query heads, for a grid that ends in (K, B)."""

    def heads(x):
        return pl.BlockSpec((None, x.shape[1], group, x.shape[3]), lambda t, n, b: (b, 0, n, 0))

    def values(x):
        return pl.BlockSpec((None, group, x.shape[2]), lambda t, n, b: (b, n, 0))

    arrays = {
        "query": queries.query,
        "dout": queries.dout,
        "lse": queries.lse,
        "delta": queries.delta,
        **bounds_operands(queries.start, queries.end),
    }
    blocks = {
        "query": heads(queries.query),
        "dout": heads(queries.dout),
        "lse": values(queries.lse),
        "delta": values(queries.delta),
        **bounds_blocks(arrays),
    }
    return arrays, blocks


def key_block(x: Any) -> pl.BlockSpec:
    """All rows of a head of [B, rows, K, dim]."""
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda t, n, b: (b, 0, n, 0))


class LoadedQueries(NamedTuple):
    """A tile of queries of a block of heads, loaded.

    Attributes:
        queries: in head parts.
        douts: the output's cotangents, in head parts.
        lse_log2: log-sum-exp in base 2, 0 for a query without keys.
        delta: ``rowsum(out * dout)``.
        seen: [S, Q], which keys the queries see; None: all.
    """

    queries: list[Array]
    douts: list[Array]
    lse_log2: Array
    delta: Array
    seen: Array | None


def load_queries(
    refs: dict[str, Any],
    tiles: TritonTiles,
    begin: Array,
    end: int | Array,
    block: Array,
    seen: Callable[[Array, Array, Array | None], Array] | None,
    *,
    packed: bool,
    padded: bool = False,
) -> LoadedQueries:
    """Loads a tile of queries of a block of heads.

    Args:
        refs: references to the arrays of `query_operands`.
        tiles: tile sizes.
        begin: position of the first query.
        end: position behind the last one that exists.
        block: number of the block of heads in the group.
        seen: ``seen(i, start, end)`` is the mask; None where all is seen.
        packed: whether each query has a start of its own.
        padded: whether padding counts as zeros.
    """
    size, heads = tiles.query, tiles.heads
    rows: Rows
    flat: Rows
    if heads == 1:
        positions = begin + jnp.arange(size, dtype=jnp.int32)
        rows, flat = (pl.ds(begin, size), block), (block, pl.ds(begin, size))
    else:
        row = jnp.arange(size * heads, dtype=jnp.int32)
        positions, head = begin + div(row, heads), block * heads + rem(row, heads)
        rows, flat = (positions, head), (head, positions)
    ragged = not isinstance(end, int) or end % size
    valid = positions < end if seen is not None and ragged else None
    mask = None
    if seen is not None:
        starts, ends = load_bounds(refs, positions, valid, packed=packed)
        mask = seen(positions[None, :], _as_row(starts), None if ends is None else _as_row(ends))
        mask = mask if valid is None else mask & valid[None, :]
        if padded:
            real = is_real(positions, starts, ends)
            valid = real if valid is None else real & valid
    return LoadedQueries(
        load_rows(refs["query"], rows, valid),
        load_rows(refs["dout"], rows, valid),
        log2_sums(load_vector(refs["lse"], flat, valid)),
        load_vector(refs["delta"], flat, valid),
        mask,
    )


def zero_gradients(size: int, dims: tuple[int, int], wanted: tuple[bool, bool]) -> KeySums:
    """No gradients yet."""
    dkey, dvalue = (
        tuple(jnp.zeros((size, width), jnp.float32) for _, width in head_parts(dim)) if want else ()
        for want, dim in zip(wanted, dims, strict=True)
    )
    return dkey, dvalue


def add_gradients(
    spec: Spec,
    key_value: list[list[Array]],
    tile: LoadedQueries,
    acc: KeySums,
    wanted: tuple[bool, bool],
    interpret: bool,
) -> KeySums:
    """Adds the part of a tile of queries to (dkey / scale, dvalue)."""
    key, value = key_value
    dtype = key[0].dtype
    logits, factor, dcap = cap_logits(spec, inner(spec, key, tile.queries))
    weights = exp2_scaled(logits, factor, tile.lse_log2[None, :], interpret=interpret)
    if tile.seen is not None:
        weights = jnp.where(tile.seen, weights, 0.0)
    dkey, dvalue = acc
    if wanted[0]:
        dlogits = weights * (inner(spec, value, tile.douts) - tile.delta[None, :])
        dlogits = (dlogits if dcap is None else dlogits * dcap).astype(dtype)
        dkey = tuple(x + dot(spec, dlogits, q) for x, q in zip(dkey, tile.queries, strict=True))
    if wanted[1]:
        weights = weights.astype(dtype)
        dvalue = tuple(x + dot(spec, weights, d) for x, d in zip(dvalue, tile.douts, strict=True))
    return dkey, dvalue


def scaled_gradients(spec: Spec, acc: KeySums, wanted: tuple[bool, bool]) -> list[list[Array]]:
    """The wanted ones of (dkey, dvalue)."""
    dkey, dvalue = acc
    results = ([x * spec.scale for x in dkey], list(dvalue))
    return [x for x, want in zip(results, wanted, strict=True) if want]


def _as_row(x: Array) -> Array:
    """[Q] as [1, Q]; a scalar as it is."""
    return x[None, :] if x.ndim else x
