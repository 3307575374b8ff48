"""Who waits for whom in the fused backward kernels.

A tile of keys waits until as many have added to a tile of queries as `Path.before` says, and they
must be those of programs that have started before.
"""

import collections
import dataclasses
import functools
import heapq
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._mosaic_gpu.backward.fused import KEYS
from pallas_kernels._mosaic_gpu.backward.scheduler import (
    AROUND,
    HANDING,
    PARTS,
    QUERIES,
    Path,
    Paths,
    cut_at_the_end,
    cut_of_tasks,
    following,
    following_down,
    task,
    with_own_queries,
)
from pallas_kernels._tile_ranges import query_plan, seen_tiles


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
    if halo and rng.random() < 0.5 and (packed or window is not None):
        filled = -(-halo // KEYS) * KEYS
        return start, window, length, -filled, filled + length
    return start, window, min(length, halo or length), -halo, halo or length


FIRST_DEVICE = [(jnp.int32(0), 256, 300, -2 * KEYS, 2 * KEYS + 300)]
"""A halo and own keys of the first device of a ring: nobody sees the halo."""
SHARDS = [shard(random.Random(seed)) for seed in range(14)] + FIRST_DEVICE


def paths_of(shard, key_tile, num_kv=1, batch=1, group=1):
    """The `Paths` of a shard."""
    start, window, rows, offset, length = shard
    return Paths(
        num_kv=num_kv, group=group, pairs=num_kv * batch, key_tile=key_tile, keys=length,
        key_tiles=-(-length // key_tile), blocks=-(-rows // QUERIES),
        before_own=-offset // key_tile if offset + length > 0 else -(-length // key_tile),
        packed=start.ndim > 0, window=window,
    )  # fmt: skip


@pytest.mark.parametrize("key_tile", [KEYS, QUERIES])
@pytest.mark.parametrize("number", range(len(SHARDS)))
def test_a_program_knows_how_many_add_before_it_and_whether_it_is_the_last(number, key_tile):
    start, window, rows, offset, length = SHARDS[number]
    plan = query_plan(
        start, window, 0, rows=rows, query_tile=QUERIES,
        offset=offset, length=length, key_tile=key_tile, reach=0,
    )  # fmt: skip
    plan = plan if start.ndim > 0 else plan[None]
    paths = paths_of(SHARDS[number], key_tile)
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


@pytest.mark.parametrize("number", range(len(SHARDS)))
def test_tasks_take_as_many_steps_as_the_plan_says(number):
    """Without documents; the halo of a ring's first device is nobody's."""
    start, window, rows, offset, length = SHARDS[number]
    if start.ndim:
        start = jnp.int32(-length)
    first_device = bool(offset) and int(start) == 0
    plan = np.asarray(query_plan(
        start, window, 0, rows=rows, query_tile=QUERIES,
        offset=offset, length=length, key_tile=KEYS, reach=0,
    ))  # fmt: skip
    paths = paths_of((start, window, rows, offset, length), KEYS, num_kv=5, group=4)
    index = jnp.arange(paths.tasks, dtype=jnp.int32)
    tiles = np.asarray(task(index, paths.key_tiles, paths.pairs, paths.side)[1])
    expected = (plan[tiles, 3] - plan[tiles, 0]).tolist()
    assert paths.steps(offset, nobodys_halo=first_device) == expected


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("cut", [1, 5, 12])
@pytest.mark.parametrize("window", [None, 300])
def test_parts_have_each_head_of_each_task_once(window, cut, parts):
    shard = jnp.int32(0), window, 256, 0, 256
    paths = dataclasses.replace(paths_of(shard, QUERIES, num_kv=3, group=4), cut=cut, parts=parts)
    plan = jnp.zeros((1, 4, 4), jnp.int32).at[..., 3].set(1)
    ways = [Path(paths, jnp.int32(n), plan, None) for n in range(paths.programs)]
    seen, before = set(), {}
    for index, way in enumerate(ways):
        assert int(way.share.heads) == (4 if index < paths.tasks - cut else 4 // parts)
        key = int(way.kv_head), int(way.tile)
        for member in range(int(way.share.heads)):
            seen.add((*key, int(way.at(jnp.int32(member), jnp.int32(0))[0])))
        # Parts come in their order, and know the last one.
        assert int(way.share.part) == before.get(key, 0)
        before[key] = before.get(key, 0) + 1
        whole = int(way.share.heads) == 4
        assert bool(way.share.is_last) == (whole or before[key] == parts)
    assert len(seen) == 3 * 4 * 4
    cut_tasks = {int(way.share.number) for way in ways if int(way.share.heads) < 4}
    assert cut_tasks == set(range(cut))


@pytest.mark.parametrize("cut_parts", [(0, 1), (3, 2), ("all", 4), ("pair", 2)])
@pytest.mark.parametrize("key_tile", [KEYS, QUERIES])
@pytest.mark.parametrize("number", range(0, len(SHARDS), 2))
def test_parts_wait_for_earlier_programs_only(number, key_tile, cut_parts):
    """One program after the other, in their order, nobody would wait."""
    start, window, rows, offset, length = SHARDS[number]
    plan = query_plan(
        start, window, 0, rows=rows, query_tile=QUERIES,
        offset=offset, length=length, key_tile=key_tile, reach=0,
    )  # fmt: skip
    paths = paths_of(SHARDS[number], key_tile, num_kv=2, group=4)
    cut, parts = cut_parts
    cut = {"all": paths.tasks, "pair": paths.key_tiles}.get(cut, cut)
    paths = dataclasses.replace(paths, cut=min(cut, paths.tasks), parts=parts)
    plan = with_own_queries(plan if start.ndim > 0 else plan[None], paths)
    added, handed = collections.Counter(), collections.Counter()
    for index in range(paths.programs):
        way = Path(paths, jnp.int32(index), plan, start)
        blocks = range(int(way.begin), int(way.end))
        before = [int(way.before(jnp.int32(block))) for block in blocks]
        first = int(way.kv_head) * 4 + int(way.share.first_head)
        for head in range(first, first + int(way.share.heads)):
            for block, expected in zip(blocks, before, strict=True):
                assert added[head, block] == expected
                added[head, block] += 1
        if int(way.share.heads) < 4:
            assert handed[int(way.share.number)] == int(way.share.part)
            handed[int(way.share.number)] += 1
    assert set(handed.values()) <= {parts}


def time_of(tiles, group, processors, cut=0, parts=1):
    """When the last program ends, if a processor takes the next one as soon as it has none."""
    free = [0] * processors
    whole, last = tiles[: len(tiles) - cut], tiles[len(tiles) - cut :]
    shared = [n * group // parts + AROUND + HANDING for n in last]
    for work in [n * group + AROUND for n in whole] + parts * shared:
        heapq.heapreplace(free, free[0] + work)
    return max(free)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 8, 12])
@pytest.mark.parametrize("count", [1, 32, 132, 140, 500, 1024])
def test_tasks_are_cut_where_that_takes_less_time(count, group):
    tiles, processors = [*range(1, 33), *[33] * count][:count], 132
    cut, parts = cut_of_tasks([tiles], group, processors, {66})
    times = {
        (cut, parts): time_of(tiles, group, processors, cut, parts)
        for cut in {count, min(66, count)}
        for parts in range(2, PARTS + 1)
        if group % parts == 0
    }
    uncut = time_of(tiles, group, processors)
    if cut:
        assert times[cut, parts] == min(times.values()) < 0.99 * uncut
    else:
        assert parts == 1 and min(times.values(), default=uncut) >= 0.99 * uncut
    if count == 32 and group == 8:
        assert times[cut, parts] < 0.4 * uncut, "nearly every processor has something to do"


def test_no_tasks_are_cut_where_there_are_very_many():
    shard = jnp.int32(0), 300, 4096, 0, 4096
    few, many = (paths_of(shard, QUERIES, num_kv=8, batch=n, group=8) for n in (1, 64))
    assert cut_at_the_end(few, 0, 500).cut > 0
    assert cut_at_the_end(many, 0, 132).cut == 0
