"""Who waits for whom in the fused backward kernel, which only a GPU runs.

A tile of keys waits until as many have added to a tile of queries as `key_tiles_of_queries` says,
and they must be those of programs that have started before.
"""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._band import key_tiles_of_queries, query_plan
from pallas_kernels._mosaic_backward import KEYS, QUERIES, following, task


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


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_walk_visits_all_heads_near_its_keys_first(group, count):
    member, n, visited = 0, 0, []
    for _ in range(group * count):
        visited.append((member, n))
        member, n = map(int, following(jnp.int32(member), jnp.int32(n), group, jnp.int32(count)))
    near = [(head, tile) for tile in range(min(2, count)) for head in range(group)]
    far = [(head, tile) for head in range(group) for tile in range(2, count)]
    assert visited == near + far


@pytest.mark.parametrize("seed", range(2))
def test_no_walk_waits_long_at_the_ends_of_documents(seed):
    """With a processor for each program nobody is late for more than a few steps."""
    rng, rows, group = random.Random(seed), 40 * QUERIES, 3
    starts = np.zeros(rows, np.int32)
    for begin in sorted(rng.sample(range(rows), 4)):
        starts[begin:] = begin
    plan = np.asarray(query_plan(
        jnp.asarray(starts[None]), 24 * QUERIES, 0, rows=rows, query_tile=QUERIES,
        offset=0, length=rows, key_tile=KEYS, reach=0,
    ))[0]  # fmt: skip
    done: dict[tuple[int, int], int] = {}
    for begin, _, _, end in plan[::-1].tolist():
        member, n, now, count = 0, 0, 0, end - begin
        for _ in range(count * group):
            now = max(now, done.get((member, begin + n), 0)) + 1
            done[member, begin + n] = now
            member, n = (int(x) for x in following(member, n, group, count))
        assert now <= count * group + KEYS // QUERIES * group
