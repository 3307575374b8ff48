"""Who waits for whom in the fused backward kernels.

A tile of keys waits until as many have added to a tile of queries as `Path.before` says, and they
must be those of programs that have started before.
"""

import functools
import heapq
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._band import query_plan, seen_tiles
from pallas_kernels._mosaic_backward import KEYS
from pallas_kernels._mosaic_key_path import (
    QUERIES,
    Path,
    Paths,
    following,
    following_down,
    task,
    with_own_queries,
)
from pallas_kernels._tiles import parts_of_group


def shard(rng: random.Random):
    """(start, window, rows, offset, length): a random shard's own keys, its halo's, or both."""
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
    start = jnp.asarray(np.maximum.accumulate(starts)[None])
    if not packed:
        start = jnp.int32(rng.choice([0, -halo]))  # on a ring's first device nobody sees the halo
    if halo and rng.random() < 0.5:
        filled = -(-halo // KEYS) * KEYS
        return start, window, length, -filled, filled + length
    return start, window, min(length, halo or length), -halo, halo or length


FIRST_DEVICE = [(jnp.int32(0), window, 300, -2 * KEYS, 2 * KEYS + 300) for window in (None, 256)]
"""A halo and own keys of the first device of a ring: nobody sees the halo."""
SHARDS = [shard(random.Random(seed)) for seed in range(14)] + FIRST_DEVICE


@pytest.mark.parametrize("key_tile", [KEYS, QUERIES])
@pytest.mark.parametrize("number", range(len(SHARDS)))
def test_a_program_knows_how_many_add_before_it_and_whether_it_is_the_last(number, key_tile):
    start, window, rows, offset, length = SHARDS[number]
    plan = query_plan(
        start, window, 0, rows=rows, query_tile=QUERIES,
        offset=offset, length=length, key_tile=key_tile, reach=0,
    )  # fmt: skip
    packed = start.ndim > 0
    plan = plan if packed else plan[None]
    paths = Paths(
        num_kv=1, group=1, pairs=1, key_tile=key_tile, keys=length,
        key_tiles=-(-length // key_tile), blocks=-(-rows // QUERIES),
        before_own=-offset // key_tile if offset + length > 0 else -(-length // key_tile),
        packed=packed, window=window,
    )  # fmt: skip
    needed = np.asarray(plan)[0]
    plan = with_own_queries(plan, paths)
    widened = np.asarray(plan)[0]
    assert (widened[:, :3] == needed[:, :3]).all(), "masks are needed where they were"
    assert (widened[:, 3] >= needed[:, 3]).all()
    seen = np.asarray(seen_tiles(plan, paths.blocks))[0]
    ways = [Path(paths, jnp.int32(n), plan, start) for n in range(paths.key_tiles)]  # as they start
    for block in range(paths.blocks):
        adders = [way for way in ways if way.begin <= block < way.end]
        assert [int(way.before(jnp.int32(block))) for way in adders] == list(range(len(adders)))
        assert seen[block] == bool(adders)
        if offset + length > 0:
            assert adders, "nobody would write gradients of queries that are padding"
        if not paths.longest_first:
            last = [bool(way.is_last(jnp.int32(block))) for way in adders]
            assert last == [way is adders[-1] for way in adders]


@pytest.mark.parametrize("side", [None, 1, 4, 16])
@pytest.mark.parametrize(("key_tiles", "pairs"), [(1, 3), (5, 1), (4, 6)])
def test_programs_wait_for_earlier_ones_only(key_tiles, pairs, side):
    index = jnp.arange(key_tiles * pairs, dtype=jnp.int32)
    pair, tile = map(np.asarray, task(index, key_tiles, pairs, side))
    assert len({*zip(pair.tolist(), tile.tolist(), strict=True)}) == len(index)
    for one in range(pairs):
        tiles = tile[pair == one].tolist()  # in the order of programs
        assert tiles == sorted(tiles, reverse=side is None)


@functools.cache
def walk(group, count, beside):
    """(head, tile of queries) by (head, tile of queries)."""
    step, visited = (jnp.int32(0), jnp.int32(0)), []
    advance = jax.jit(lambda member, n: following(member, n, group, count, beside))
    for _ in range(group * count):
        visited.append(tuple(map(int, step)))
        step = advance(*step)
    return visited


@pytest.mark.parametrize("beside", [None, 0, 2])
@pytest.mark.parametrize(("group", "count"), [(1, 5), (3, 1), (3, 2), (3, 3), (2, 7)])
def test_a_walk_begins_with_all_heads_of_the_tiles_beside(group, count, beside):
    near = [(head, tile) for tile in range(min(beside or 0, count)) for head in range(group)]
    far = [(head, tile) for head in range(group) for tile in range(beside or 0, count)]
    assert walk(group, count, beside) == near + far


@pytest.mark.parametrize(("group", "count"), [(1, 5), (3, 1), (2, 7)])
def test_a_walk_down_goes_through_all_heads_at_each_tile(group, count):
    step, visited = (jnp.int32(0), jnp.int32(0)), []
    for _ in range(group * count):
        visited.append(tuple(map(int, step)))
        step = following_down(*step, group)
    assert visited == [(head, n) for n in range(count) for head in range(group)]


@pytest.mark.parametrize("seed", range(2))
def test_tiles_of_one_document_do_not_wait_for_another_document(seed):
    """With a processor for each program nobody is late for more than a few steps."""
    rng, blocks, group, beside = random.Random(seed), 40, 3, KEYS // QUERIES
    starts = np.zeros(blocks * QUERIES, np.int32)
    for begin in sorted(rng.sample(range(len(starts)), 4)):
        starts[begin:] = begin
    plan = query_plan(
        jnp.asarray(starts[None]), 24 * QUERIES, 0, rows=len(starts), query_tile=QUERIES,
        offset=0, length=len(starts), key_tile=KEYS, reach=0,
    )  # fmt: skip
    done: dict[tuple[int, int], int] = {}
    for tile, (begin, _, _, end) in reversed([*enumerate(np.asarray(plan)[0].tolist())]):
        several = starts[tile * KEYS + KEYS - 1] > tile * KEYS
        now = 0
        for head, n in walk(group, end - begin, beside if several else 0):
            now = max(now, done.get((head, begin + n), 0)) + 1
            done[head, begin + n] = now
        assert now <= (end - begin + beside) * group


def time_of(work, processors):
    """When the last program ends, if a processor takes the next one as soon as it has none."""
    free = [0.0] * processors
    for one in work:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize("programs", [1, 8, 32, 100, 128, 132, 140, 256, 352, 1024])
def test_groups_are_cut_where_programs_are_few(programs, ramp):
    group, processors = 8, 132
    times = {
        parts: time_of(
            [(programs - n) / programs / parts if ramp else 1 / parts
             for n in range(programs) for _ in range(parts)],
            processors,
        )
        for parts in (1, 2, 4, 8)
    }  # fmt: skip
    found = parts_of_group(programs, group, processors, ramp=ramp)
    assert times[found] <= 1.15 * min(times.values())
    assert found == 1 or times[found] <= 0.95 * times[1], "cut in vain"
