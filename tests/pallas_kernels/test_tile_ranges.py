"""Every plan against all pairs of small shards: none is missed, and only useful tiles are visited.

The rows of a batch are sequences of two shards in a row, cut into documents, some of them padding.
The queries are those of the second shard, so that its first document may have begun before it.
"""

import functools
import random

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pallas_kernels import _sink_ranges, _tile_ranges
from pallas_kernels._masks import min_sink_distance
from tests.helpers.cases import random_runs
from tests.helpers.oracle import PADDING, visible
from tests.helpers.tiles import assert_useful, covered, full_tiles, tiled, tiles_with

T = 24  # queries of a shard
NO_WINDOW = -1  # window of the oracle's `visible` in which there is not even the query's own key
TILES = [(4, 8), (5, 7), (24, 24), (32, 3)]  # rows of a query and of a key tile
WINDOWS = [0, 3, 24, None]
SINKS = [0, 1, 9]
HALOS = [7, 24]


def starts_of(runs):
    """First position of each token's document."""
    starts, position = [], 0
    for run in runs:
        starts += [PADDING if run < 0 else position] * abs(run)
        position += abs(run)
    return starts


RNG = random.Random(0)
RUNS = [
    (48,), (24, 24), (23, 25), (25, 23), (10, 38), (20, 8, 20), (24, -24), (30, -18), (-48,),
    (24, *[1] * 24), (22, 3, 3, 3, -2, 15),
    *(random_runs(RNG, T, 2 * T, padding_inside=True) for _ in range(9)),
]  # fmt: skip
STARTS = np.array([starts_of(runs) for runs in RUNS])
PADDED = STARTS[:, T:] == PADDING
# As the kernels get them: relative to the shard, and i + 1 for a padding query i.
START = np.where(STARTS == PADDING, np.arange(-T, T) + 1, STARTS - T)[:, T:]

TILED = pytest.mark.parametrize(("query_tile", "key_tile"), TILES)
WINDOWED = pytest.mark.parametrize("window", WINDOWS)
WITH_SINKS = pytest.mark.parametrize("sinks", SINKS)


@functools.cache
def pairs(window, sinks, offset=-T, length=2 * T):
    """[batch, T, length]: which key of a run each query attends."""
    seen = np.stack([visible(starts, window, sinks) for starts in STARTS])
    return seen[:, T:, T + offset : T + offset + length]


def check_key_plan(window, sinks, rows, query_tile, offset, length, key_tile):
    plan = _tile_ranges.key_plan(
        jnp.asarray(START), window, sinks,
        rows=rows, query_tile=query_tile, offset=offset, length=length, key_tile=key_tile,
    )  # fmt: skip
    sink_begin, sink_end, begin, unmasked_begin, unmasked_end, end = np.moveaxis(plan, -1, 0)
    queries = slice(*rows)
    useful = tiles_with(pairs(window, sinks, offset, length)[:, queries], query_tile, key_tile)
    count = useful.shape[2]
    assert (sink_end <= begin).all()
    visited = covered(sink_begin, sink_end, count) | covered(begin, end, count)
    padded = tiled(PADDED[:, queries], 1, query_tile).any(2)
    assert_useful(visited, useful, padded[..., None])

    assert (np.diff([begin, unmasked_begin, unmasked_end, end], axis=0) >= 0).all()
    windowed = pairs(window, 0, offset, length)[:, queries]
    ragged = -windowed.shape[1] % query_tile  # a last tile of fewer queries may be unmasked
    windowed = np.pad(windowed, ((0, 0), (0, ragged), (0, 0)), constant_values=True)
    unmasked = covered(unmasked_begin, unmasked_end, count)
    assert_array_equal(unmasked, full_tiles(windowed, query_tile, key_tile))


@WITH_SINKS
@WINDOWED
@TILED
def test_key_plan_of_own_keys(window, sinks, query_tile, key_tile):
    check_key_plan(window, sinks, (0, T), query_tile, 0, T, key_tile)


@WINDOWED
@pytest.mark.parametrize("rows", [(0, 13), (8, T)], ids=str)
def test_key_plan_of_some_rows(window, rows):
    check_key_plan(window, 2, rows, 4, 0, T, 5)


@WINDOWED
@TILED
@pytest.mark.parametrize("length", HALOS)
def test_key_plan_of_a_halo(window, query_tile, key_tile, length):
    check_key_plan(window, 0, (0, T), query_tile, -length, length, key_tile)


def check_query_plan(window, sinks, rows, query_tile, offset, length, key_tile, min_distance):
    plan = _tile_ranges.query_plan(
        jnp.asarray(START), window, sinks,
        rows=rows, query_tile=query_tile, offset=offset, length=length, key_tile=key_tile,
        min_distance=min_distance,
    )  # fmt: skip
    begin, unmasked_begin, unmasked_end, end = np.moveaxis(plan, -1, 0)
    windowed = pairs(window, 0, offset, length)[:, :rows]
    not_distant = (np.arange(T) - START < min_distance)[..., None]
    seen = windowed | (pairs(NO_WINDOW, sinks, offset, length) & not_distant)[:, :rows]
    useful = tiles_with(seen, query_tile, key_tile).swapaxes(1, 2)
    count = useful.shape[2]
    padded = np.zeros((len(START), useful.shape[1]), bool)
    if offset == 0:
        padded = tiled(PADDED[:, :length], 1, key_tile).any(2)
    assert_useful(covered(begin, end, count), useful, padded[..., None])

    assert (np.diff([begin, unmasked_begin, unmasked_end, end], axis=0) >= 0).all()
    unmasked = covered(unmasked_begin, unmasked_end, count)
    assert_array_equal(unmasked, full_tiles(windowed, query_tile, key_tile).swapaxes(1, 2))
    assert_array_equal(
        np.asarray(_tile_ranges.seen_tiles(plan, count)), covered(begin, end, count).any(1)
    )


@WITH_SINKS
@WINDOWED
@TILED
def test_query_plan_of_own_keys(window, sinks, query_tile, key_tile):
    min_distance = 0 if window is None else min_sink_distance(window, sinks, query_tile)
    sinks = 0 if window is None else sinks
    check_query_plan(window, sinks, T, query_tile, 0, T, key_tile, min_distance)


@WINDOWED
@pytest.mark.parametrize("rows", [5, 13])
def test_query_plan_of_some_rows(window, rows):
    check_query_plan(window, 0, rows, 4, 0, T, 5, 0)


@WINDOWED
@TILED
@pytest.mark.parametrize("length", HALOS)
def test_query_plan_of_a_halo(window, query_tile, key_tile, length):
    check_query_plan(window, 0, T, query_tile, -length, length, key_tile, 0)


@WINDOWED
@pytest.mark.parametrize("length", HALOS)
@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 6), (5, 13), (0, 23), (20, 23)])
def test_key_span(window, length, first, last):
    for offset, size in ((0, T), (-length, length)):
        low, high = _tile_ranges.key_span(
            jnp.int32(first), jnp.int32(last), jnp.asarray(START[:, first]), window,
            offset=offset, length=size,
        )  # fmt: skip
        seen = pairs(window, 0, offset, size)[:, first : last + 1].any(1)
        within = covered(np.asarray(low), np.asarray(high) + 1, size)
        padded = PADDED[:, first : last + 1].any(1)
        assert_useful(within, seen, padded[:, None])


def fetched_sinks(window, sinks):
    """[batch, T, slots]: which queries see which sink of the sequence that crosses into the shard.

    Slot p holds the key at position start + p, which is not fetched if it lies in the shard.
    """
    beyond = pairs(window, sinks) & ~pairs(window, 0)
    seen = np.zeros((len(STARTS), T, sinks), bool)
    for row, start in enumerate(START[:, 0]):
        slots = np.arange(start, min(start + sinks, 0))
        seen[row, :, : len(slots)] = beyond[row][:, slots + T]
    return seen


@pytest.mark.parametrize("sinks", [1, 9])
@pytest.mark.parametrize("window", [0, 3, 23, 40])
@pytest.mark.parametrize(("query_tile", "key_tile"), [(1, 1), (4, 8), (24, 24)])
def test_fetched_sinks_of_each_tile_of_queries(window, sinks, query_tile, key_tile):
    plan = _sink_ranges.fetched_sink_key_plan(
        jnp.asarray(START), window,
        rows=(0, T), query_tile=query_tile, length=sinks, key_tile=key_tile,
    )  # fmt: skip
    useful = tiles_with(fetched_sinks(window, sinks), query_tile, key_tile)
    visited = covered(np.zeros_like(plan), np.asarray(plan), useful.shape[2])
    # The count is that of the tile's last query, which may be of a later sequence.
    other = tiled(START[:, :1] != START, 1, query_tile).any(2)
    assert_useful(visited, useful, other[..., None])


@pytest.mark.parametrize("sinks", [1, 5])
@pytest.mark.parametrize("window", [0, 2, 9])
@pytest.mark.parametrize(("query_tile", "chunk"), [(1, 1), (2, 4), (4, 8), (8, 8)])
def test_tiles_of_queries_that_are_distant_from_their_sinks(window, sinks, query_tile, chunk):
    min_distance = min_sink_distance(window, sinks, chunk)
    plan = _sink_ranges.sink_query_plan(
        jnp.asarray(START), min_distance, rows=T, query_tile=query_tile, chunk=chunk
    )
    distant = ~PADDED & (np.arange(T) - START >= min_distance)
    useful = tiled(distant, 1, query_tile).any(2)
    of_chunk = np.arange(useful.shape[1]) * query_tile // chunk == np.arange(T // chunk)[:, None]
    begin, end = np.moveaxis(plan, -1, 0)[:2]
    visited = covered(begin, end, useful.shape[1])
    assert_array_equal(visited, useful[:, None] & of_chunk)


@pytest.mark.parametrize("sinks", [1, 5])
@pytest.mark.parametrize("chunk", [1, 8, 24])
@pytest.mark.parametrize("key_tile", [1, 5, 24])
def test_chunks_whose_first_query_has_sinks_in_a_tile(sinks, chunk, key_tile):
    plan = _sink_ranges.sink_chunk_plan(
        jnp.asarray(START), sinks, offset=0, rows=T, chunk=chunk, length=T, key_tile=key_tile
    )
    first = START[:, ::chunk, None]
    own = np.arange(T)
    of_sequence = (first <= own) & (own < first + sinks)
    useful = tiled(of_sequence, 2, key_tile).any(3).swapaxes(1, 2)
    visited = covered(*np.moveaxis(plan, -1, 0), useful.shape[2])
    # A sequence that began before the shard counts as if it began with it.
    before = (first < 0).swapaxes(1, 2) & (np.arange(useful.shape[1]) * key_tile < sinks)[:, None]
    assert_useful(visited, useful, before)
