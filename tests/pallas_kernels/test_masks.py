"""Every mask against the sentences of section 1 of the design, on all pairs of small shards.

Query i attends key j of its own sequence, j <= i, iff its window holds j (i - j <= W) or j is a
sink (j - start < num_sinks). A shard counts positions from its own first query.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pallas_kernels import _masks
from tests.helpers.oracle import PADDING, visible

CHUNK = 6  # queries of a shard; the sequence has three shards
LENGTH = 3 * CHUNK
NO_WINDOW = -1  # window of the oracle's `visible` in which there is not even the query's own key
ROWS = {
    "one": [0] * 18,
    "three": [0] * 4 + [4] * 9 + [13] * 5,
    "ends_at_edges": [0] * 6 + [6] * 6 + [12] * 6,
    "single_tokens": [0] * 5 + [5, 6, 7] + [8] * 4 + [12, 13] + [14] * 4,
    "padding": [0] * 3 + [PADDING] * 2 + [5] * 6 + [PADDING] * 3 + [14] * 2 + [PADDING] * 2,
    "nothing": [PADDING] * 18,
}
WINDOWS = [0, 1, 4, 5, 6, 7, 11, 17, 30, None]
SINKS = [0, 1, 2, 5]

pytestmark = pytest.mark.parametrize("sinks", SINKS)


class Shards:
    """All shards of all rows at once, [rows and shards, queries, keys].

    Attributes:
        i, j, start: positions of queries, of keys and of the queries' sequences, in the shard.
        windowed, sink, attends: which sentence holds for which pair.
    """

    def __init__(self, window: int | None, sinks: int):
        starts = np.array(list(ROWS.values()))
        position = np.arange(LENGTH)
        begin = CHUNK * np.arange(3)[:, None, None]

        def by_shard(x):  # [rows, S, ...] -> [rows, shards, T, ...]
            return x.reshape(len(ROWS), 3, CHUNK, *x.shape[2:])

        def pairs(*settings):
            seen = by_shard(np.stack([visible(row, *settings) for row in starts]))
            return seen.reshape(-1, CHUNK, LENGTH)

        # A padding query i comes to the kernels with the start i + 1.
        start = by_shard(np.where(starts == PADDING, position + 1, starts))[..., None]
        self.start = jnp.asarray((start - begin).reshape(-1, CHUNK, 1))
        self.i = jnp.arange(CHUNK)[:, None]
        self.j = jnp.asarray(np.tile(position - begin, (len(ROWS), 1, 1)))
        self.windowed = pairs(window)
        self.sink = pairs(NO_WINDOW, sinks)
        self.attends = pairs(window, sinks)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_window_and_the_sinks(window, sinks):
    x = Shards(window, sinks)
    assert_array_equal(_masks.in_window(x.i, x.j, x.start, window), x.windowed)
    assert_array_equal(_masks.is_sink(x.i, x.j, x.start, sinks), x.sink)
    assert_array_equal(_masks.sees(x.i, x.j, x.start, window, sinks, packed=True), x.attends)


@pytest.mark.parametrize("window", WINDOWS)
def test_keys_of_the_own_sequence_need_no_start(window, sinks):
    """Unless packed, masks hold for the keys that a plan visits: those of the query's sequence."""
    x = Shards(window, sinks)
    visited = x.start <= x.j
    in_window = np.asarray(_masks.in_window(x.i, x.j, None, window))
    assert_array_equal(in_window[visited], x.windowed[visited])
    for mask in (_masks.sees, _masks.sees_without_fetched_sinks):
        unpacked, packed = (
            np.asarray(mask(x.i, x.j, x.start, window, sinks, packed=p)) for p in (False, True)
        )
        assert_array_equal(unpacked[visited], packed[visited])


@pytest.mark.parametrize("window", WINDOWS)
def test_a_halo_and_fetched_sinks_share_the_pairs_out(window, sinks):
    x = Shards(window, sinks)
    of_halo = np.asarray(
        _masks.sees_without_fetched_sinks(x.i, x.j, x.start, window, sinks, packed=True)
    )
    assert_array_equal(of_halo, x.windowed | (x.sink & (x.j >= 0)))
    fetched = _masks.sees_fetched_sink(x.i, x.j, x.start, window, sinks)
    assert_array_equal(fetched, x.attends & ~of_halo)
    beyond = _masks.sees_beyond_window(x.i, x.j, x.start, window, sinks)
    assert_array_equal(beyond, x.attends & ~x.windowed)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("first_query", "keys_end"), [(0, -3), (0, 1), (0, 2), (3, 4), (3, 5)])
def test_no_tile_needs_a_mask_where_all_see_all(window, sinks, first_query, keys_end):
    i = first_query + jnp.arange(LENGTH)[:, None]
    j = jnp.arange(-CHUNK, keys_end)[None]
    seen = _masks.sees(i, j, jnp.int32(-CHUNK), window, sinks, packed=False)
    where = {"first_query": first_query, "keys_end": keys_end}
    told = _masks.sees_all_keys(window, **where, one_sequence=True)
    assert told == (window is None and bool(seen.all()))
    assert not _masks.sees_all_keys(window, **where, one_sequence=False)


@pytest.mark.parametrize("stop", [-CHUNK, 0, 1, 4, CHUNK])
def test_sinks_before_a_key(sinks, stop):
    x = Shards(None, sinks)
    before = _masks.sees_sink_before(x.i, x.j, x.start, sinks, stop)
    assert_array_equal(before, x.sink & (x.j < stop))


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 4, 7])
def test_distant_sinks_and_all_else_share_the_pairs_out(window, sinks, chunk):
    min_distance = _masks.min_sink_distance(window, sinks, chunk)
    x = Shards(window, sinks)
    rest = _masks.sees_except_distant_sinks(
        x.i, x.j, x.start, window, sinks, min_distance, packed=True
    )
    distant = np.asarray(_masks.sees_distant_sink(x.i, x.j, x.start, sinks, min_distance))
    assert_array_equal(rest, x.windowed | (x.sink & (x.i - x.start < min_distance)))
    assert_array_equal(rest | distant, x.attends)
    assert not (distant & x.windowed).any()
    for begin in range(0, CHUNK, chunk):
        queries = slice(begin, begin + chunk)
        for start, is_distant in zip(x.start[:, queries], distant[:, queries].any(-1), strict=True):
            assert len(np.unique(start[is_distant])) <= 1, (
                "two sequences with distant queries in a chunk"
            )


@pytest.mark.parametrize("window", WINDOWS)
def test_ranges_hold_what_is_seen(window, sinks):
    shards = Shards(window, sinks)
    i, j, start = shards.i, shards.j, shards.start
    for end, first_key in ((None, None), (None, 0), (start + 3, None), (start + 3, -2)):
        ranges = _masks.key_ranges(i, start, window, sinks, end=end, first_key=first_key)
        found = [
            _masks.in_range(j, first, _masks.range_length(first, stop)) for first, stop in ranges
        ]
        behind = {} if first_key is None else {"first_key": first_key}
        rule = _masks.sees_without_fetched_sinks if behind else _masks.sees
        expected = rule(i, j, start, window, sinks, packed=True, end=end, **behind)
        assert_array_equal(np.logical_or.reduce(found), expected)
