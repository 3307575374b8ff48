"""Which tiles of keys a tile of queries sees, and which tiles of queries see a tile of keys.

Positions, ``start`` and ``end`` are those of `_masks`. ``start``, ``end``, the first key in the
window, ``max(start, i - W)``, and the last one, ``min(i, end - 1)``, never decrease along the
queries. So the keys of a query tile form one contiguous range, plus one range of sinks before it;
and so do the queries of a key tile, whether sequences are packed or not. A plan holds these ranges,
in tiles, for every tile of a launch; within its range, an *unmasked* tile is one whose every query
sees every key, so that it needs no mask.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Int

from pallas_kernels._masks import is_real
from pallas_kernels._spec import Ends, minus
from pallas_kernels._tile_positions import (
    at_queries,
    count_up_to,
    queries_from,
    tile_edges,
    tiles_of,
)


class KeyColumns:
    """The columns of a `key_plan`: tiles of keys that a tile of queries sees.

    Sinks before the windows are in the tiles ``SINK_BEGIN..SINK_END-1``, the keys of the windows in
    ``BEGIN..END-1``, of which ``UNMASKED_BEGIN..UNMASKED_END-1`` need no mask. `with_padding` adds
    ``HAS_PADDING``.
    """

    SINK_BEGIN, SINK_END, BEGIN, UNMASKED_BEGIN, UNMASKED_END, END, HAS_PADDING = range(7)
    WINDOW = BEGIN, UNMASKED_BEGIN, UNMASKED_END, END


class QueryColumns:
    """The columns of a `query_plan`: tiles of queries that see a tile of keys.

    They are ``BEGIN..END-1``, of which ``UNMASKED_BEGIN..UNMASKED_END-1`` need no mask.
    `with_padding` adds ``HAS_PADDING``.
    """

    BEGIN, UNMASKED_BEGIN, UNMASKED_END, END, HAS_PADDING = range(5)
    ALL = BEGIN, UNMASKED_BEGIN, UNMASKED_END, END


def key_span(
    first: Int[Array, "..."],
    last: Int[Array, "..."],
    first_start: Int[Array, "..."],
    window: int | None,
    *,
    offset: int,
    length: int,
    last_end: Int[Array, "..."] | None = None,
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """First and last of the keys of a run that queries ``first..last`` may see in their windows.

    Both count from the run's own first key; a last key before the first one says that there is
    none. ``first_start`` is the start of query ``first``'s sequence, ``last_end`` the end of query
    ``last``'s.
    """
    low = jnp.maximum(_windows_begin(first, first_start, window) - offset, 0)
    last = _windows_end(last, last_end)
    return low, jnp.maximum(jnp.minimum(last - offset, length - 1), low - 1)


def key_plan(
    start: Int[Array, "..."],
    window: int | None,
    num_sinks: int,
    *,
    rows: tuple[int, int],
    query_tile: int,
    offset: int,
    length: int,
    key_tile: int,
    end: Ends = None,
) -> Int[Array, "... tiles 6"]:
    """Key tiles of a run at positions ``offset..offset+length-1``, for each tile of queries.

    Returns:
        `KeyColumns`. Sink tiles end before the window tiles begin. One range of sinks is enough: a
        sequence that begins inside the query tile has its sinks in the window tiles.
    """
    first, last = tile_edges(rows, query_tile)
    first_start, last_start = at_queries(start, first), at_queries(start, last)
    first_end, last_end = (None if end is None else at_queries(end, x) for x in (first, last))
    low = _windows_begin(first, first_start, window) - offset
    high = _windows_end(last, last_end) - offset
    low, high = jnp.maximum(low, 0), jnp.minimum(high, length - 1)
    begin, stop = tiles_of(low, high, key_tile)

    unmasked_low = jnp.maximum(_windows_begin(last, last_start, window) - offset, 0)
    unmasked_begin = jnp.clip(-(-unmasked_low // key_tile), begin, stop)
    unmasked_stop = jnp.minimum(_windows_end(first, first_end) - offset + 1, length) // key_tile
    unmasked_end = jnp.clip(unmasked_stop, unmasked_begin, stop)

    sink_low = jnp.maximum(first_start - offset, 0)
    sink_high = jnp.minimum(first_start + num_sinks - 1, last) - offset
    sink_begin, sink_end = tiles_of(sink_low, sink_high, key_tile)
    sink_begin, sink_end = jnp.minimum(sink_begin, begin), jnp.minimum(sink_end, begin)
    ranges = (sink_begin, sink_end, begin, unmasked_begin, unmasked_end, stop)
    return jnp.stack(jnp.broadcast_arrays(*ranges), axis=-1).astype(jnp.int32)


def query_plan(
    start: Int[Array, "..."],
    window: int | None,
    num_sinks: int,
    *,
    rows: int,
    query_tile: int,
    offset: int,
    length: int,
    key_tile: int,
    min_distance: int,
    end: Ends = None,
) -> Int[Array, "... tiles 4"]:
    """Query tiles, among the first ``rows`` queries, that see each tile of keys of a run.

    Sinks count where `sees_except_distant_sinks` says so with this ``min_distance``.

    Returns:
        `QueryColumns`.
    """
    first, last = tile_edges((offset, offset + length), key_tile)
    stop_of_first, stop_of_last = (queries_from(start, x, rows) for x in (first, last))
    high = stop_of_last - 1
    unmasked_stop = stop_of_first
    if window is not None:
        last_seeing = last + window
        if num_sinks:
            # The last key's sequence is the last to have a sink in the tile, if there is one.
            last_start = at_queries(start, jnp.clip(minus(last, offset), 0, rows - 1))
            holds_sink = last_start + num_sinks - 1 >= first
            last_not_distant = last_start + min_distance - 1
            last_seeing_sink = jnp.where(holds_sink, last_not_distant, last_seeing)
            last_seeing = jnp.maximum(last_seeing, last_seeing_sink)
        high = jnp.minimum(high, last_seeing)
        unmasked_stop = jnp.minimum(unmasked_stop, first + window + 1)
    low = _first_seeing(first, end, rows)
    begin, stop = tiles_of(low, jnp.minimum(high, rows - 1), query_tile)
    unmasked_begin = jnp.clip(-(-_first_seeing(last, end, rows) // query_tile), begin, stop)
    whole = (last - first + 1 == key_tile) & (unmasked_stop > 0)
    unmasked_end = jnp.where(whole, jnp.minimum(unmasked_stop, rows) // query_tile, 0)
    ranges = (begin, unmasked_begin, jnp.clip(unmasked_end, unmasked_begin, stop), stop)
    return jnp.stack(jnp.broadcast_arrays(*ranges), axis=-1).astype(jnp.int32)


def with_padding(
    plan: Int[Array, "... tiles n"],
    start: Int[Array, "B T"],
    begin: Int[Array, "B tiles"],
    stop: Int[Array, "B tiles"],
    tile: int,
    end: Int[Array, "B T"] | None = None,
) -> Int[Array, "... tiles n+1"]:
    """A plan and one column: whether tokens ``begin * tile..stop * tile - 1`` have padding."""
    padding = ~is_real(jnp.arange(start.shape[1], dtype=jnp.int32)[None], start, end)
    blocks = pl.cdiv(start.shape[1], tile)
    padding = jnp.pad(padding, ((0, 0), (0, blocks * tile - start.shape[1])))
    count = jnp.cumsum(padding.reshape(-1, blocks, tile).any(-1), axis=1, dtype=jnp.int32)
    count = jnp.pad(count, ((0, 0), (1, 0)))
    before_begin, before_end = (jnp.take_along_axis(count, x, axis=1) for x in (begin, stop))
    found = (before_end > before_begin).astype(jnp.int32)
    return jnp.concatenate((plan, found[..., None]), axis=-1)


def seen_tiles(plan: Int[Array, "... tiles 4"], blocks: int) -> Bool[Array, "... blocks"]:
    """Which of ``blocks`` tiles of queries see any tile of keys, by a `query_plan`."""
    block = jnp.arange(blocks, dtype=jnp.int32)[:, None]
    has_begun = plan[..., None, :, QueryColumns.BEGIN] <= block
    return (has_begun & (block < plan[..., None, :, QueryColumns.END])).any(-1)


def _windows_begin(
    query: Int[Array, "..."], start: Int[Array, "..."], window: int | None
) -> Int[Array, "..."]:
    return start if window is None else jnp.maximum(start, query - window)


def _windows_end(query: Int[Array, "..."], end: Int[Array, "..."] | None) -> Int[Array, "..."]:
    """The last key that a query sees."""
    return query if end is None else jnp.minimum(query, end - 1)


def _first_seeing(keys: Int[Array, "tiles"], end: Ends, rows: int) -> Int[Array, "..."]:
    """The first query whose window ends at or after a key."""
    low = jnp.maximum(keys, 0)
    if end is None:
        return low
    if not end.ndim:
        return jnp.where(end > keys, low, rows)
    return jnp.maximum(low, count_up_to(end, keys).astype(jnp.int32))
