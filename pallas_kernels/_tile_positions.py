"""Positions, sequences and tiles: the arithmetic that `_tile_ranges` and `_sink_ranges` share.

Starts and ends of sequences, [B, T] or a single one, never decrease along the queries. So a binary
search finds the first query, or the last, whose sequence starts or ends before a position.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from pallas_kernels import _device


def tile_edges(span: tuple[int, int], tile: int) -> tuple[Int[Array, "tiles"], Int[Array, "tiles"]]:
    """First and last positions of the tiles of a span."""
    first = jnp.arange(*span, tile, dtype=jnp.int32)
    return first, jnp.minimum(first + tile, span[1]) - 1


def tiles_of(
    low: Int[Array, "..."], high: Int[Array, "..."], tile: int
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Half-open range of tiles that hold positions ``low..high``, ``low >= 0``."""
    begin = low // tile
    return begin, jnp.where(high < low, begin, high // tile + 1)


def at_queries(start: Int[Array, "..."], queries: Int[Array, "tiles"]) -> Int[Array, "..."]:
    """Starts, or ends, of the sequences of queries; one for all where there is one sequence."""
    return start[..., queries] if start.ndim else start


def queries_from(start: Int[Array, "..."], keys: Int[Array, "..."], rows: int) -> Int[Array, "..."]:
    """How many of the first ``rows`` queries are in a sequence that starts at or before a key."""
    if not start.ndim:
        return jnp.where(start <= keys, rows, 0)
    return jnp.minimum(count_up_to(start, keys), rows).astype(jnp.int32)


def count_up_to(
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
