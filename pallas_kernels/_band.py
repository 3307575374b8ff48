"""The geometry all kernels share: which keys a query sees, and which tiles hold them.

Positions count from the first query of the shard, so keys before the shard have negative
positions. ``start`` is the position of the first token of a query's own sequence; a padding
query has ``start > i``. Both ``start`` and the first key in the window, ``max(start, i - W)``,
never decrease along the queries, so the keys of a query tile form one contiguous range, plus one
range of sinks before it, whether sequences are packed or not.
"""

import jax.numpy as jnp
from jax import Array


def in_window(i, j, start, window: int | None):
    """Key j is query i's own or one of the ``window`` keys before it, in i's sequence."""
    own_past = (start <= j) & (j <= i)
    return own_past if window is None else own_past & (i - j <= window)


def is_sink(i, j, start, num_sinks: int):
    """Key j is one of the first ``num_sinks`` tokens of query i's sequence, and not after i."""
    return (start <= j) & (j <= i) & (j - start < num_sinks)


def sees(i, j, start, window: int | None, num_sinks: int):
    """Query i attends key j of its shard or halo."""
    seen = in_window(i, j, start, window)
    return seen | is_sink(i, j, start, num_sinks) if num_sinks else seen


def sees_fetched_sink(i, j, start, window: int | None, num_sinks: int):
    """Query i attends key j fetched as a sink: never a key that the shard or the window holds."""
    return is_sink(i, j, start, num_sinks) & ~in_window(i, j, start, window) & (j < 0)


def window_tiles(first, last, start, window: int | None, *, offset: int, length: int, tile: int):
    """Half-open range of key tiles that hold the windows of queries ``first..last``.

    ``start`` belongs to query ``first``; the keys stand at positions ``offset..offset+length-1``.
    """
    low = start if window is None else jnp.maximum(start, first - window)
    low = jnp.maximum(low - offset, 0)
    high = jnp.minimum(last - offset, length - 1)
    begin = low // tile
    return begin, jnp.where(high < low, begin, high // tile + 1)


def sink_tiles(last, start, num_sinks: int, window_begin: Array, *, offset: int, tile: int):
    """Half-open range of key tiles before ``window_begin`` that hold the first query's sinks.

    One range is enough: a sequence that begins inside the query tile has its sinks in the tile's
    window range.
    """
    low = jnp.maximum(start - offset, 0)
    high = jnp.minimum(start + num_sinks - 1, last) - offset
    begin = jnp.minimum(low // tile, window_begin)
    return begin, jnp.where(high < low, begin, jnp.minimum(high // tile + 1, window_begin))
