"""Which tiles see sinks that are not among the tiles of `_tile_ranges`.

These are the fetched sinks, which are no keys of any run; and the shard's own sinks as distant
queries see them (`_masks.min_sink_distance`), for backward kernels that give these a launch of
their own. Positions and ``start`` are those of `_masks`.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from pallas_kernels._tile_positions import (
    at_queries,
    count_up_to,
    queries_from,
    tile_edges,
    tiles_of,
)


def keys_before_shard(start: Int[Array, "..."], first_key: int) -> Int[Array, "..."]:
    """How many keys before the shard a sequence has that starts at ``start``; negative: none.

    ``first_key`` is the position of the shard's first key.
    """
    return first_key - start if first_key else -start


def fetched_sink_count(
    last: Int[Array, "..."],
    first_start: Int[Array, "..."],
    crossing: Int[Array, "..."],
    window: int,
    *,
    length: int,
    first_key: int = 0,
) -> Int[Array, "..."]:
    """How many fetched sinks a tile of queries sees whose last query is ``last``.

    ``first_start`` is the start of its first query, ``crossing`` that of the shard's first.
    ``first_key`` is the position of the shard's first key.
    """
    before_shard = keys_before_shard(crossing, first_key)
    before_window = jnp.minimum(last - window - crossing, before_shard)
    slots = jnp.clip(before_window, 0, length)
    return jnp.where(first_start == crossing, slots, 0)


def fetched_sink_key_plan(
    start: Int[Array, "..."],
    window: int,
    *,
    rows: tuple[int, int],
    query_tile: int,
    length: int,
    key_tile: int,
    first_key: int = 0,
) -> Int[Array, "... tiles"]:
    """How many tiles of fetched sinks each tile of queries sees."""
    first, last = tile_edges(rows, query_tile)
    slots = fetched_sink_count(
        last, at_queries(start, first), _crossing(start), window, length=length, first_key=first_key
    )
    return (-(-slots // key_tile)).astype(jnp.int32)


def sink_query_plan(
    start: Int[Array, "..."], min_distance: int, *, rows: int, query_tile: int, chunk: int
) -> Int[Array, "... chunks 3"]:
    """The tiles of each chunk of queries that hold queries distant from their sinks.

    A distant query is ``min_distance`` or more after the start of its sequence, which then is that
    of the chunk's first query (see `min_sink_distance`).

    Returns:
        (first tile, end of the tiles, end of the queries) of each chunk.
    """
    first, last = tile_edges((0, rows), chunk)
    crossing = at_queries(start, first)
    low = jnp.maximum(first, crossing + min_distance)
    high = jnp.minimum(last, queries_from(start, crossing, rows) - 1)
    ranges = (*tiles_of(low, high, query_tile), high + 1)
    return jnp.stack(jnp.broadcast_arrays(*ranges), axis=-1).astype(jnp.int32)


def sink_chunk_plan(
    start: Int[Array, "..."],
    num_sinks: int,
    *,
    rows: int,
    chunk: int,
    offset: int,
    length: int,
    key_tile: int,
) -> Int[Array, "... tiles 2"]:
    """Chunks, as in `sink_query_plan`, whose first query's sequence has sinks in a tile of keys.

    Returns:
        Half-open ranges of chunks.
    """
    first, last = tile_edges((offset, offset + length), key_tile)
    chunks, _ = tile_edges((0, rows), chunk)
    sinks = jnp.maximum(at_queries(start, chunks), offset)
    sinks = jnp.broadcast_to(sinks, (*start.shape[:-1], chunks.size))
    begin = count_up_to(sinks + num_sinks, first)
    end = count_up_to(sinks, last)
    return jnp.stack((begin, jnp.maximum(begin, end)), axis=-1).astype(jnp.int32)


def _crossing(start: Int[Array, "..."]) -> Int[Array, "... 1"]:
    """Start of the sequence that the first query is in, ready to meet a row of tiles."""
    return start[..., :1] if start.ndim else start[None]
