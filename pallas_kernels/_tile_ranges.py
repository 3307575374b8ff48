"""Which tiles of keys a tile of queries sees, and which tiles of queries see a tile of keys.

Positions, ``start`` and ``end`` are those of `_masks`. ``start``, ``end``, the first key in the
window, ``max(start, i - W)``, and the last one, ``min(i, end - 1)``, never decrease along the
queries. So the keys of a query tile form one contiguous range, plus one range of sinks before it;
and so do the queries of a key tile, whether sequences are packed or not. A plan holds these ranges,
in tiles, for every tile of a launch; within its range, an *unmasked* tile is one whose every query
sees every key, so that it needs no mask.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from pallas_kernels import _device
from pallas_kernels._masks import is_real
from pallas_kernels._spec import Ends


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
        (first sink tile, their end, first window tile, first unmasked tile, end of the unmasked
        ones, end of the window tiles). Sink tiles end before the window tiles begin. One range of
        sinks is enough: a sequence that begins inside the query tile has its sinks in the window
        tiles.
    """
    first, last = _tile_edges(rows, query_tile)
    first_start, last_start = _at(start, first), _at(start, last)
    first_end, last_end = (None if end is None else _at(end, x) for x in (first, last))
    low = _windows_begin(first, first_start, window) - offset
    high = _windows_end(last, last_end) - offset
    low, high = jnp.maximum(low, 0), jnp.minimum(high, length - 1)
    begin, stop = _tiles_of(low, high, key_tile)

    unmasked_low = jnp.maximum(_windows_begin(last, last_start, window) - offset, 0)
    unmasked_begin = jnp.clip(-(-unmasked_low // key_tile), begin, stop)
    unmasked_stop = jnp.minimum(_windows_end(first, first_end) - offset + 1, length) // key_tile
    unmasked_end = jnp.clip(unmasked_stop, unmasked_begin, stop)

    sink_low = jnp.maximum(first_start - offset, 0)
    sink_high = jnp.minimum(first_start + num_sinks - 1, last) - offset
    sink_begin, sink_end = _tiles_of(sink_low, sink_high, key_tile)
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
        (first tile, first unmasked tile, end of the unmasked ones, end of all).
    """
    first, last = _tile_edges((offset, offset + length), key_tile)
    stop_of_first, stop_of_last = (
        _queries_from(start, first, rows),
        _queries_from(start, last, rows),
    )
    high = stop_of_last - 1
    unmasked_stop = stop_of_first
    if window is not None:
        last_seeing = last + window
        if num_sinks:
            # The last key's sequence is the last to have a sink in the tile, if there is one.
            last_start = _at(start, jnp.clip(last - offset if offset else last, 0, rows - 1))
            holds_sink = last_start + num_sinks - 1 >= first
            last_not_distant = last_start + min_distance - 1
            last_seeing_sink = jnp.where(holds_sink, last_not_distant, last_seeing)
            last_seeing = jnp.maximum(last_seeing, last_seeing_sink)
        high = jnp.minimum(high, last_seeing)
        unmasked_stop = jnp.minimum(unmasked_stop, first + window + 1)
    low = _first_seeing(first, end, rows)
    begin, stop = _tiles_of(low, jnp.minimum(high, rows - 1), query_tile)
    unmasked_begin = jnp.clip(-(-_first_seeing(last, end, rows) // query_tile), begin, stop)
    whole = (last - first + 1 == key_tile) & (unmasked_stop > 0)
    unmasked_end = jnp.where(whole, jnp.minimum(unmasked_stop, rows) // query_tile, 0)
    ranges = (begin, unmasked_begin, jnp.clip(unmasked_end, unmasked_begin, stop), stop)
    return jnp.stack(jnp.broadcast_arrays(*ranges), axis=-1).astype(jnp.int32)


def with_padding(
    plan: Int[Array, "... tiles n"],
    start: Int[Array, "B T"],
    begin,
    stop,
    tile: int,
    end: Int[Array, "B T"] | None = None,
) -> Int[Array, "... tiles n+1"]:
    """A plan and one column: whether tokens ``begin * tile..stop * tile - 1`` have padding."""
    padding = ~is_real(jnp.arange(start.shape[1], dtype=jnp.int32)[None], start, end)
    blocks = -(-start.shape[1] // tile)
    padding = jnp.pad(padding, ((0, 0), (0, blocks * tile - start.shape[1])))
    count = jnp.cumsum(padding.reshape(-1, blocks, tile).any(-1), axis=1, dtype=jnp.int32)
    count = jnp.pad(count, ((0, 0), (1, 0)))
    before_begin, before_end = (jnp.take_along_axis(count, x, axis=1) for x in (begin, stop))
    found = (before_end > before_begin).astype(jnp.int32)
    return jnp.concatenate((plan, found[..., None]), axis=-1)


def seen_tiles(plan: Int[Array, "... tiles 4"], blocks: int) -> Bool[Array, "... blocks"]:
    """Which of ``blocks`` tiles of queries see any tile of keys, by a `query_plan`."""
    block = jnp.arange(blocks, dtype=jnp.int32)[:, None]
    return ((plan[..., None, :, 0] <= block) & (block < plan[..., None, :, 3])).any(-1)


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
    before_shard = first_key - crossing if first_key else -crossing
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
    first, last = _tile_edges(rows, query_tile)
    slots = fetched_sink_count(
        last, _at(start, first), _crossing(start), window, length=length, first_key=first_key
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
    first, last = _tile_edges((0, rows), chunk)
    crossing = _at(start, first)
    low = jnp.maximum(first, crossing + min_distance)
    high = jnp.minimum(last, _queries_from(start, crossing, rows) - 1)
    ranges = (*_tiles_of(low, high, query_tile), high + 1)
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
    first, last = _tile_edges((offset, offset + length), key_tile)
    chunks, _ = _tile_edges((0, rows), chunk)
    sinks = jnp.maximum(_at(start, chunks), offset)
    sinks = jnp.broadcast_to(sinks, (*start.shape[:-1], chunks.size))
    begin = _count_up_to(sinks + num_sinks, first)
    end = _count_up_to(sinks, last)
    return jnp.stack((begin, jnp.maximum(begin, end)), axis=-1).astype(jnp.int32)


def _tile_edges(
    span: tuple[int, int], tile: int
) -> tuple[Int[Array, "tiles"], Int[Array, "tiles"]]:
    """First and last positions of the tiles of a span."""
    first = jnp.arange(*span, tile, dtype=jnp.int32)
    return first, jnp.minimum(first + tile, span[1]) - 1


def _at(start: Int[Array, "..."], queries: Int[Array, "tiles"]) -> Int[Array, "..."]:
    return start[..., queries] if start.ndim else start


def _crossing(start: Int[Array, "..."]) -> Int[Array, "... 1"]:
    """Start of the sequence that the first query is in, ready to meet a row of tiles."""
    return start[..., :1] if start.ndim else start[None]


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
    return jnp.maximum(low, _count_up_to(end, keys).astype(jnp.int32))


def _queries_from(
    start: Int[Array, "..."], keys: Int[Array, "..."], rows: int
) -> Int[Array, "..."]:
    """How many of the first ``rows`` queries are in a sequence that starts at or before a key."""
    if not start.ndim:
        return jnp.where(start <= keys, rows, 0)
    return jnp.minimum(_count_up_to(start, keys), rows).astype(jnp.int32)


def _count_up_to(
    sorted_values: Int[Array, "*batch n"], values: Int[Array, "..."]
) -> Int[Array, "*batch tiles"]:
    """How many of the sorted values, of each row, are at most each value."""

    def count(row, x):
        # As a loop it compiles faster, but is several launches on a GPU for each of its steps.
        method = "scan_unrolled" if _device.compiled_platform() == "gpu" else "scan"
        return jnp.searchsorted(row, x, side="right", method=method)

    if sorted_values.ndim == 1:
        return count(sorted_values, values)
    values = jnp.broadcast_to(values, (sorted_values.shape[0], values.shape[-1]))
    return jax.vmap(count)(sorted_values, values)


def _tiles_of(
    low: Int[Array, "..."], high: Int[Array, "..."], tile: int
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Half-open range of tiles that hold positions ``low..high``, ``low >= 0``."""
    begin = low // tile
    return begin, jnp.where(high < low, begin, high // tile + 1)
