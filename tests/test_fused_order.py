"""Which tiles of keys add to a tile of queries in the fused backward kernel, and in what order.

The kernel waits on a GPU until as many have added as `key_tiles_of_queries` says.
"""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._band import key_tiles_of_queries, query_plan

QUERIES, KEYS = 64, 128


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


@pytest.mark.parametrize("seed", range(12))
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
