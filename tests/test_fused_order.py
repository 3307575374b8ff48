"""Who waits for whom in the fused backward kernel, which only a GPU runs.

A tile of keys waits until as many have added to a tile of queries as `key_tiles_of_queries` says,
and they must be those of programs that have started before.
"""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._band import key_tiles_of_queries, query_plan
from pallas_kernels._mosaic_backward import KEYS, QUERIES, task


def shard(rng: random.Random):
    """(start, window, rows, offset, length): a random shard's own keys, or its halo's."""
    length = QUERIES * rng.randint(1, 11) + rng.randint(0, QUERIES - 1)
    halo = rng.choice([0, 0, 90, length])
    window = rng.choice([None, 0, 1, 63, 64, 127, 128, 300, halo or 70])
    if halo and window is not None:
        window = max(window, halo)
    starts = np.full(length, -halo, np.int32)
    for begin in sorted(rng.sample(range(length), min(5, length))):
        starts[begin:] = begin
    if rng.random() < 0.5:  # padding, which sees no key
        begin = rng.randrange(length)
        end = min(length, begin + rng.randint(1, 200))
        starts[begin:end] = end
        starts[end:] = np.maximum(starts[end:], end)
    packed = rng.random() < 0.7
    start = jnp.asarray(np.maximum.accumulate(starts)[None]) if packed else jnp.int32(-halo)
    return start, window, min(length, halo or length), -halo, halo or length


@pytest.mark.parametrize("seed", range(6))
def test_adders_of_a_query_tile_are_consecutive(seed):
    start, window, rows, offset, length = shard(random.Random(seed))
    plan = query_plan(
        start, window, 0, rows=rows, query_tile=QUERIES,
        offset=offset, length=length, key_tile=KEYS, reach=0,
    )  # fmt: skip
    blocks = -(-rows // QUERIES)
    first, last = key_tiles_of_queries(plan, blocks)
    ranges = np.asarray(plan).reshape(-1, 4)
    for block in range(blocks):
        adders = [n for n, (begin, _, _, end) in enumerate(ranges) if begin <= block < end]
        low, high = (int(np.ravel(x)[block]) for x in (first, last))
        assert adders == list(range(low, high + 1))


@pytest.mark.parametrize("longest_first", [False, True])
@pytest.mark.parametrize(("key_tiles", "pairs"), [(1, 3), (5, 1), (4, 6)])
def test_programs_wait_for_earlier_ones_only(key_tiles, pairs, longest_first):
    index = jnp.arange(key_tiles * pairs, dtype=jnp.int32)
    pair, tile = map(np.asarray, task(index, key_tiles, pairs, longest_first=longest_first))
    assert len({*zip(pair.tolist(), tile.tolist(), strict=True)}) == len(index)
    for one in range(pairs):
        tiles = tile[pair == one].tolist()  # in the order of programs
        assert tiles == sorted(tiles, reverse=not longest_first)
