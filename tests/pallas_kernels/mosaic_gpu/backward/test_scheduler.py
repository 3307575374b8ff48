"""Schedules of the fused backward kernels.

Before a program adds to the gradients of a tile of queries, it waits until as many others have
added as `ProgramSchedule.adders_before` says. These must be programs that started before it.
"""

import collections
import dataclasses
import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._mosaic_gpu.backward.fused import KEY_TILE
from pallas_kernels._mosaic_gpu.backward.query_plans import (
    last_key_blocks,
    plan_in_order,
    plan_with_diagonal,
    plan_with_first_block,
)
from pallas_kernels._mosaic_gpu.backward.scheduler import (
    ProgramSchedule,
    next_state_heads_first,
    next_state_tiles_first,
)
from pallas_kernels._mosaic_gpu.backward.task_splits import steps_per_head
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE, BackwardSchedule, task_coordinates
from pallas_kernels._tile_ranges import query_plan, seen_tiles


def shard(rng: random.Random):
    """(start, window, rows, offset, length): a random shard's own keys, its halo's, or both."""
    length = QUERY_TILE * rng.randint(1, 11) + rng.randint(0, QUERY_TILE - 1)
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
        start = jnp.int32(rng.choice([0, -halo]))  # on a ring's first device no query sees the halo
    if halo and rng.random() < 0.5 and (packed or window is not None):
        filled = -(-halo // KEY_TILE) * KEY_TILE
        return start, window, length, -filled, filled + length
    return start, window, min(length, halo or length), -halo, halo or length


FIRST_DEVICE = [(jnp.int32(0), 256, 300, -2 * KEY_TILE, 2 * KEY_TILE + 300)]
"""A halo and own keys of the first device of a ring, where no query sees the halo."""
SEES_ALL = [(jnp.int32(-256), None, 300, -256, 256)]
"""Keys that all queries see."""
SHARDS = [shard(random.Random(seed)) for seed in range(14)] + FIRST_DEVICE + SEES_ALL


def schedule_of(shard, key_tile, num_kv_heads=1, batch=1, group_size=1):
    """The `BackwardSchedule` of a shard."""
    start, window, rows, offset, length = shard
    has_own_keys = offset + length > 0
    return BackwardSchedule(
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        batch_kv_heads=num_kv_heads * batch,
        key_tile=key_tile,
        num_keys=length,
        num_key_tiles=-(-length // key_tile),
        num_query_tiles=-(-rows // QUERY_TILE),
        offset=offset,
        halo_key_tiles=-offset // key_tile if has_own_keys else -(-length // key_tile),
        packed=start.ndim > 0,
        window=window,
    )


@pytest.mark.parametrize("key_tile", [KEY_TILE, QUERY_TILE])
@pytest.mark.parametrize("number", range(len(SHARDS)))
def test_a_program_knows_how_many_add_before_it_and_whether_it_is_the_last(number, key_tile):
    start, window, rows, offset, length = SHARDS[number]
    plan = query_plan(
        start, window, 0, rows=rows, query_tile=QUERY_TILE,
        offset=offset, length=length, key_tile=key_tile, min_distance=0,
    )  # fmt: skip
    plan = plan if start.ndim > 0 else plan[None]
    launch = schedule_of(SHARDS[number], key_tile)
    needed = np.asarray(plan)[0]
    plan = plan_with_diagonal(plan, launch)
    widened = np.asarray(plan)[0]
    assert (widened[:, :3] == needed[:, :3]).all(), "masks are needed where they were"
    assert (widened[:, 3] >= needed[:, 3]).all()
    seen = np.asarray(seen_tiles(plan, launch.num_query_tiles))[0]
    programs = [  # in the order in which they start
        ProgramSchedule(launch, jnp.int32(n), plan, start) for n in range(launch.num_key_tiles)
    ]
    for block in range(launch.num_query_tiles):
        adders = [program for program in programs if program.begin <= block < program.end]
        before = [int(program.adders_before(jnp.int32(block))) for program in adders]
        assert before == list(range(len(adders)))
        assert seen[block] == bool(adders)
        if offset + length > 0:
            assert adders, "no program would write gradients of queries that are padding"
        if not launch.longest_first:
            last = [bool(program.adds_last(jnp.int32(block))) for program in adders]
            assert last == [program is adders[-1] for program in adders]


def documents_around_a_chunk(rng: random.Random):
    """(starts, ends, window, rows, offset, length): documents, keys moved to the front.

    The keys are the chunk's alone, or also those before and after it that windows reach.
    """
    rows = QUERY_TILE * rng.randint(1, 7) + rng.randint(0, QUERY_TILE - 1)
    left, right = rng.choice([0, 1, 64, 100]), rng.choice([1, 64, 127, rows + 100])
    whole = left + rows + right
    edges = sorted({0, whole, *rng.sample(range(whole), min(6, whole))})
    start, end = np.zeros(whole, np.int32), np.zeros(whole, np.int32)
    for first, behind in itertools.pairwise(edges):
        if rng.random() < 0.3:  # padding
            start[first:behind] = end[first:behind] = np.arange(first, behind) + 1
        else:
            start[first:behind], end[first:behind] = first, behind
    moved = slice(left, left + rows)
    start, end = (x[None, moved] - left - right for x in (start, end))
    window = rng.choice([left + right, None])
    if window is None or rng.random() < 0.5:
        return start, end, window, rows, -right, rows
    filled = -(-(left + right) // KEY_TILE) * KEY_TILE
    return start, end, window, rows, -filled, filled + rows


@pytest.mark.parametrize("key_tile", [KEY_TILE, QUERY_TILE])
@pytest.mark.parametrize("seed", range(8))
def test_a_program_knows_who_adds_where_documents_have_ends(seed, key_tile):
    start, end, window, rows, offset, length = documents_around_a_chunk(random.Random(seed))
    bounds = jnp.asarray(start), jnp.asarray(end)
    plan = query_plan(
        bounds[0], window, 0, rows=rows, query_tile=QUERY_TILE, offset=offset, length=length,
        key_tile=key_tile, min_distance=0, end=bounds[1],
    )  # fmt: skip
    launch = schedule_of((bounds[0], window, rows, offset, length), key_tile)
    launch = dataclasses.replace(launch, has_ends=True)
    plan = plan_in_order(plan)
    last = last_key_blocks(plan, launch)
    programs = [
        ProgramSchedule(launch, jnp.int32(n), plan, bounds[0], last)
        for n in range(launch.num_key_tiles)
    ]
    i, j = np.arange(rows)[:, None], np.arange(length) + offset
    seen = (j <= i) & (j >= start.T) & (j < end.T)
    if window is not None:
        seen &= i - j <= window
    for block in range(launch.num_query_tiles):
        adders = [program for program in programs if program.begin <= block < program.end]
        before = [int(program.adders_before(jnp.int32(block))) for program in adders]
        assert before == list(range(len(adders)))
        is_last = [bool(program.adds_last(jnp.int32(block))) for program in adders]
        assert is_last == [program is adders[-1] for program in adders]
        for program in programs:
            keys = int(program.key_block) * key_tile
            pairs = seen[block * QUERY_TILE :][:QUERY_TILE, keys : keys + key_tile]
            assert program in adders or not pairs.any()
            if program.is_unmasked(jnp.int32(block)):
                assert pairs.all()


@pytest.mark.parametrize("side", [None, 1, 4, 16])
@pytest.mark.parametrize(("key_tiles", "kv_heads"), [(1, 3), (5, 1), (4, 6)])
def test_programs_wait_for_earlier_ones_only(key_tiles, kv_heads, side):
    index = jnp.arange(key_tiles * kv_heads, dtype=jnp.int32)
    kv_head, tile = map(np.asarray, task_coordinates(index, key_tiles, kv_heads, side))
    assert len({*zip(kv_head.tolist(), tile.tolist(), strict=True)}) == len(index)
    for head in range(kv_heads):
        tiles = tile[kv_head == head].tolist()  # in the order of programs
        assert tiles == sorted(tiles, reverse=side is None)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "side"),
    [(32768, 32, 8, 1), (16384, 16, 16, 8), (8192, 32, 8, 4), (2048, 32, 8, 4), (2**20, 8, 8, 1)],
)
def test_heads_side_by_side_without_a_window(tokens, heads, kv_heads, side):
    shard = jnp.int32(0), None, tokens, 0, tokens
    launch = schedule_of(shard, KEY_TILE, num_kv_heads=kv_heads, group_size=heads // kv_heads)
    assert launch.kv_heads_side_by_side == side


@functools.cache
def states(group, count, diagonal):
    """(head, tile of queries) of all steps of a schedule."""
    step, visited = (jnp.int32(0), jnp.int32(0)), []
    advance = jax.jit(lambda member, n: next_state_tiles_first(member, n, group, count, diagonal))
    for _ in range(group * count):
        visited.append(tuple(map(int, step)))
        step = advance(*step)
    return visited


@pytest.mark.parametrize("diagonal", [None, 0, 2])
@pytest.mark.parametrize(("group", "count"), [(1, 5), (3, 1), (3, 2), (3, 3), (2, 7)])
def test_all_heads_of_the_diagonal_come_first(group, count, diagonal):
    on_diagonal = [
        (head, tile) for tile in range(min(diagonal or 0, count)) for head in range(group)
    ]
    beyond = [(head, tile) for head in range(group) for tile in range(diagonal or 0, count)]
    assert states(group, count, diagonal) == on_diagonal + beyond


@pytest.mark.parametrize(("group", "count"), [(1, 5), (3, 1), (2, 7)])
def test_all_heads_come_at_each_tile_without_a_window(group, count):
    step, visited = (jnp.int32(0), jnp.int32(0)), []
    for _ in range(group * count):
        visited.append(tuple(map(int, step)))
        step = next_state_heads_first(*step, group)
    assert visited == [(head, n) for n in range(count) for head in range(group)]


@pytest.mark.parametrize("seed", range(2))
def test_tiles_of_one_document_do_not_wait_for_another_document(seed):
    """With a multiprocessor for each program none is late by more than a few steps."""
    rng, blocks, group, diagonal = random.Random(seed), 40, 3, KEY_TILE // QUERY_TILE
    starts = np.zeros(blocks * QUERY_TILE, np.int32)
    for begin in sorted(rng.sample(range(len(starts)), 4)):
        starts[begin:] = begin
    plan = query_plan(
        jnp.asarray(starts[None]), 24 * QUERY_TILE, 0, rows=len(starts), query_tile=QUERY_TILE,
        offset=0, length=len(starts), key_tile=KEY_TILE, min_distance=0,
    )  # fmt: skip
    done: dict[tuple[int, int], int] = {}
    for tile, (begin, _, _, end) in reversed([*enumerate(np.asarray(plan)[0].tolist())]):
        several = starts[tile * KEY_TILE + KEY_TILE - 1] > tile * KEY_TILE
        now = 0
        for head, n in states(group, end - begin, diagonal if several else 0):
            now = max(now, done.get((head, begin + n), 0)) + 1
            done[head, begin + n] = now
        assert now <= (end - begin + diagonal) * group


@pytest.mark.parametrize("number", range(len(SHARDS)))
def test_tasks_take_as_many_steps_as_the_plan_says(number):
    """Without documents; on a ring's first device no query sees the halo."""
    start, window, rows, offset, length = SHARDS[number]
    if start.ndim:
        start = jnp.int32(-length)
    first_device = bool(offset) and int(start) == 0
    plan = np.asarray(query_plan(
        start, window, 0, rows=rows, query_tile=QUERY_TILE,
        offset=offset, length=length, key_tile=KEY_TILE, min_distance=0,
    ))  # fmt: skip
    launch = schedule_of(
        (start, window, rows, offset, length), KEY_TILE, num_kv_heads=5, group_size=4
    )
    index = jnp.arange(launch.tasks, dtype=jnp.int32)
    _, tiles = task_coordinates(
        index, launch.num_key_tiles, launch.batch_kv_heads, launch.kv_heads_side_by_side
    )
    tiles = np.asarray(tiles)
    expected = (plan[tiles, 3] - plan[tiles, 0]).tolist()
    assert steps_per_head(launch, halo_is_seen=not first_device) == expected


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("split_tasks", [1, 5, 12])
@pytest.mark.parametrize("window", [None, 300])
def test_parts_have_each_head_of_each_task_once(window, split_tasks, parts):
    shard = jnp.int32(0), window, 256, 0, 256
    launch = schedule_of(shard, QUERY_TILE, num_kv_heads=3, group_size=4)
    launch = dataclasses.replace(launch, split_tasks=split_tasks, parts=parts)
    plan = jnp.zeros((1, 4, 4), jnp.int32).at[..., 3].set(1)
    programs = [ProgramSchedule(launch, jnp.int32(n), plan, None) for n in range(launch.programs)]
    seen, before = set(), {}
    for index, program in enumerate(programs):
        assert int(program.part.heads) == (4 if index < launch.tasks - split_tasks else 4 // parts)
        key = int(program.kv_head), int(program.key_block)
        for member in range(int(program.part.heads)):
            seen.add((*key, int(program.coordinates(jnp.int32(member), jnp.int32(0))[0])))
        # Parts come in their order, and know the last one.
        assert int(program.part.part) == before.get(key, 0)
        before[key] = before.get(key, 0) + 1
        whole = int(program.part.heads) == 4
        assert bool(program.part.is_last) == (whole or before[key] == parts)
    assert len(seen) == 3 * 4 * 4
    numbers = {int(program.part.number) for program in programs if int(program.part.heads) < 4}
    assert numbers == set(range(split_tasks))


def long_window(rng: random.Random):
    """A random shard, as `shard`, whose window reaches far into a halo, joined with its own keys.

    Some queries see no key of the halo's first tiles, or the sequence starts within the halo.
    """
    length = QUERY_TILE * rng.randint(2, 9) + rng.randint(0, QUERY_TILE - 1)
    halo = KEY_TILE * rng.randint(1, 5)
    window = rng.randint(max(1, halo - 3 * KEY_TILE), halo + 70)
    start = rng.choice([0, -halo, -halo - 40, -KEY_TILE, -KEY_TILE - 64])
    return jnp.int32(start), window, length, -halo, halo + length


HALO_ALONE = (jnp.int32(-320), 300, 200, -320, 320)
"""A launch over the keys of a halo and over no others."""
LONG_WINDOWS = [*(long_window(random.Random(seed)) for seed in range(8)), HALO_ALONE]


@pytest.mark.parametrize("split", [(0, 1), ("halo", 4), ("all", 2)])
@pytest.mark.parametrize("number", range(len(LONG_WINDOWS)))
def test_programs_of_a_halo_that_comes_last_wait_for_earlier_ones_only(number, split):
    launch = dataclasses.replace(
        schedule_of(LONG_WINDOWS[number], KEY_TILE, num_kv_heads=2, group_size=4), halo_last=True
    )
    index = jnp.arange(launch.tasks, dtype=jnp.int32)
    assert len({*zip(*(x.tolist() for x in launch.task_coordinates(index)), strict=True)}) == len(
        index
    )
    check_order(LONG_WINDOWS[number], launch, split)


def test_programs_of_a_halo_that_comes_last_hardly_wait_for_each_other():
    """With a multiprocessor for each program none is late by more than a few steps."""
    halo, length = 5 * KEY_TILE, 10 * QUERY_TILE
    shard = jnp.int32(-halo), halo - 1, length, -halo, halo + length
    launch = dataclasses.replace(schedule_of(shard, KEY_TILE), halo_last=True)
    plan = query_plan(
        shard[0], shard[1], 0, rows=length, query_tile=QUERY_TILE,
        offset=-halo, length=halo + length, key_tile=KEY_TILE, min_distance=0,
    )  # fmt: skip
    plan = plan_with_first_block(plan_with_diagonal(plan[None], launch))
    done: dict[int, int] = {}
    for task in range(launch.tasks - launch.halo_tasks, launch.tasks):
        program, now = ProgramSchedule(launch, jnp.int32(task), plan, None), 0
        for n in range(int(program.steps)):
            block = int(program.coordinates(jnp.int32(0), jnp.int32(n))[1])
            now = done[block] = max(now, done.get(block, 0)) + 1
        assert now <= int(program.steps) + 2


@pytest.mark.parametrize("first_device", [False, True])
@pytest.mark.parametrize("number", range(len(LONG_WINDOWS)))
def test_tasks_of_a_halo_that_comes_last_take_as_many_steps_as_the_plan_says(number, first_device):
    _, window, rows, offset, length = LONG_WINDOWS[number]
    start = jnp.int32(0 if first_device else offset)
    shard = start, window, rows, offset, length
    launch = dataclasses.replace(schedule_of(shard, KEY_TILE, num_kv_heads=2), halo_last=True)
    plan = np.asarray(query_plan(
        start, window, 0, rows=rows, query_tile=QUERY_TILE,
        offset=offset, length=length, key_tile=KEY_TILE, min_distance=0,
    ))  # fmt: skip
    tiles = np.asarray(launch.task_coordinates(jnp.arange(launch.tasks, dtype=jnp.int32))[1])
    expected = np.maximum(plan[tiles, 3] - plan[tiles, 0], 0).tolist()
    assert steps_per_head(launch, halo_is_seen=not first_device) == expected


@pytest.mark.parametrize("split", [(0, 1), (3, 2), ("all", 4), ("head", 2)])
@pytest.mark.parametrize("key_tile", [KEY_TILE, QUERY_TILE])
@pytest.mark.parametrize("number", [*range(0, 14, 2), 14, 15])
def test_parts_wait_for_earlier_programs_only(number, key_tile, split):
    launch = schedule_of(SHARDS[number], key_tile, num_kv_heads=2, group_size=4)
    check_order(SHARDS[number], launch, split)


def check_order(shard, launch, split):
    """Programs that ran one after the other, in the order of their indices, would never wait."""
    start, window, rows, offset, length = shard
    plan = query_plan(
        start, window, 0, rows=rows, query_tile=QUERY_TILE,
        offset=offset, length=length, key_tile=launch.key_tile, min_distance=0,
    )  # fmt: skip
    split_tasks, parts = split
    named = {"all": launch.tasks, "head": launch.num_key_tiles, "halo": launch.halo_tasks}
    split_tasks = named.get(split_tasks, split_tasks)
    launch = dataclasses.replace(launch, split_tasks=min(split_tasks, launch.tasks), parts=parts)
    plan = plan_with_diagonal(plan if start.ndim > 0 else plan[None], launch)
    plan = plan_with_first_block(plan) if launch.halo_last else plan
    added, stored = collections.Counter(), collections.Counter()
    for index in range(launch.programs):
        program = ProgramSchedule(launch, jnp.int32(index), plan, start)
        steps = range(int(program.end) - int(program.begin))
        blocks = [int(program.coordinates(jnp.int32(0), jnp.int32(n))[1]) for n in steps]
        assert sorted(blocks) == list(range(int(program.begin), int(program.end)))
        before = [int(program.adders_before(jnp.int32(block))) for block in blocks]
        first = int(program.kv_head) * 4 + int(program.part.first_head)
        for head in range(first, first + int(program.part.heads)):
            for block, expected in zip(blocks, before, strict=True):
                assert added[head, block] == expected
                added[head, block] += 1
        if int(program.part.heads) < 4:
            assert stored[int(program.part.number)] == int(program.part.part)
            stored[int(program.part.number)] += 1
    assert set(stored.values()) <= {parts}
