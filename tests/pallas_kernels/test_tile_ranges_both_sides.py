"""Plans of windows that reach past the query, against all pairs of small shards.

The rows of a batch are sequences of three shards in a row, cut into documents, some of them
padding. The queries are those of the second shard. Keys are moved to the front, see `Spec`.
"""

import functools
import random

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pallas_kernels import _tile_ranges
from tests.helpers.cases import random_runs
from tests.helpers.oracle import PADDING, visible
from tests.helpers.tiles import assert_useful, covered, full_tiles, tiled, tiles_with

T = 24  # queries of a shard
WINDOWS = [(0, 1), (3, 5), (24, 3), (5, 24), (None, 7), (7, None), (None, None)]
TILES = [(4, 8), (5, 7), (24, 24)]  # rows of a query and of a key tile
RNG = random.Random(0)
RUNS = [
    (72,), (24, 24, 24), (23, 25, 24), (30, 17, 25), (10, 62), (24, -24, 24), (40, -8, 24),
    (24, *[1] * 24, 24), *(random_runs(RNG, T, 3 * T, padding_inside=True) for _ in range(8)),
]  # fmt: skip


def bounds_of(runs):
    """(start, end) of each token's document, as the kernels get them but for the move."""
    position, starts, ends = 0, [], []
    for run in runs:
        for i in range(position, position + abs(run)):
            starts.append(position if run > 0 else i + 1)
            ends.append(position + run if run > 0 else i + 1)
        position += abs(run)
    return np.array(starts), np.array(ends)


BOUNDS = np.array([bounds_of(runs) for runs in RUNS])
PADDED = (BOUNDS[:, 0] == BOUNDS[:, 1])[:, T : 2 * T]


def moved(window):
    """Keyword arguments of a plan: (start, end, causal window, lookahead)."""
    left, right = window
    lookahead = T * 3 if right is None else right
    start, end = (jnp.asarray(x[:, T : 2 * T] - T - lookahead, jnp.int32)
                  for x in np.moveaxis(BOUNDS, 1, 0))  # fmt: skip
    return start, end, None if left is None else left + lookahead, lookahead


@functools.cache
def pairs(window, begin, length):
    """[batch, T, length]: which keys, from one on, each query attends."""
    found = []
    for start, end in BOUNDS:
        starts = np.where(start == end, PADDING, start)
        found.append(visible(starts, window)[T : 2 * T, begin : begin + length])
    return np.stack(found)


# Own keys, and those of a halo on either side.
KEYS = [(T, T), (T - 7, 7), (2 * T, 7), (0, T), (2 * T, T)]


@pytest.mark.parametrize(("begin", "length"), KEYS)
@pytest.mark.parametrize(("query_tile", "key_tile"), TILES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_key_plan(window, query_tile, key_tile, begin, length):
    start, end, width, lookahead = moved(window)
    plan = _tile_ranges.key_plan(
        start, width, 0, rows=(0, T), query_tile=query_tile,
        offset=begin - T - lookahead, length=length, key_tile=key_tile, end=end,
    )  # fmt: skip
    *_, first, unmasked_begin, unmasked_end, stop = np.moveaxis(plan, -1, 0)
    seen = pairs(window, begin, length)
    useful = tiles_with(seen, query_tile, key_tile)
    padded = tiled(PADDED, 1, query_tile).any(2)
    assert_useful(covered(first, stop, useful.shape[2]), useful, padded[..., None])
    ragged = -T % query_tile  # a last tile of fewer queries may be unmasked
    seen = np.pad(seen, ((0, 0), (0, ragged), (0, 0)), constant_values=True)
    unmasked = covered(unmasked_begin, unmasked_end, useful.shape[2])
    assert_array_equal(unmasked, full_tiles(seen, query_tile, key_tile))


@pytest.mark.parametrize(("begin", "length"), KEYS)
@pytest.mark.parametrize(("query_tile", "key_tile"), TILES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_query_plan(window, query_tile, key_tile, begin, length):
    start, end, width, lookahead = moved(window)
    plan = _tile_ranges.query_plan(
        start, width, 0, rows=T, query_tile=query_tile, min_distance=0,
        offset=begin - T - lookahead, length=length, key_tile=key_tile, end=end,
    )  # fmt: skip
    first, unmasked_begin, unmasked_end, stop = np.moveaxis(plan, -1, 0)
    seen = pairs(window, begin, length)
    useful = tiles_with(seen, query_tile, key_tile).swapaxes(1, 2)
    count = useful.shape[2]
    # A tile of keys of two documents reaches from the first one's queries to the last one's.
    assert not (useful & ~covered(first, stop, count)).any()
    unmasked = covered(unmasked_begin, unmasked_end, count)
    assert_array_equal(unmasked, full_tiles(seen, query_tile, key_tile).swapaxes(1, 2))
