"""Which tasks of the fused backward kernels are split."""

import dataclasses
import heapq

import pytest

from pallas_kernels._mosaic_gpu.backward.task_splits import (
    HANDOFF_COST,
    MAX_PARTS,
    PROGRAM_OVERHEAD,
    choose_split,
    split_last_tasks,
)
from pallas_kernels._mosaic_gpu.backward.tasks import BackwardSchedule


def time_of(tiles, group_size, num_sms, split_tasks=0, parts=1):
    """When the last program ends, if each idle multiprocessor takes the next one."""
    idle_from = [0] * num_sms
    whole, split = tiles[: len(tiles) - split_tasks], tiles[len(tiles) - split_tasks :]
    costs = [n * group_size + PROGRAM_OVERHEAD for n in whole]
    costs += parts * [n * group_size // parts + PROGRAM_OVERHEAD + HANDOFF_COST for n in split]
    for cost in costs:
        heapq.heapreplace(idle_from, idle_from[0] + cost)
    return max(idle_from)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 6, 8, 12])
@pytest.mark.parametrize("count", [1, 32, 132, 140, 500, 1024])
def test_tasks_are_split_where_that_takes_less_time(count, group_size):
    tiles, num_sms = [*range(1, 33), *[33] * count][:count], 132
    split_tasks, parts = choose_split([tiles], group_size, num_sms, {66})
    times = {
        (n, parts): time_of(tiles, group_size, num_sms, n, parts)
        for n in {count, min(66, count)}
        for parts in range(2, MAX_PARTS + 1)
        if group_size % parts == 0
    }
    unsplit = time_of(tiles, group_size, num_sms)
    if split_tasks:
        assert times[split_tasks, parts] == min(times.values()) < 0.99 * unsplit
    else:
        assert parts == 1 and min(times.values(), default=unsplit) >= 0.99 * unsplit
    if count == 32 and group_size == 8:
        assert times[split_tasks, parts] < 0.4 * unsplit, "few multiprocessors are idle"


def test_no_tasks_are_split_where_there_are_very_many():
    few = BackwardSchedule(
        num_kv_heads=8,
        group_size=8,
        batch_kv_heads=8,
        key_tile=64,
        num_keys=4096,
        num_key_tiles=64,
        num_query_tiles=64,
        offset=0,
        halo_key_tiles=0,
        packed=False,
        window=300,
    )
    many = dataclasses.replace(few, batch_kv_heads=64 * 8)
    assert split_last_tasks(few, 500).split_tasks > 0
    assert split_last_tasks(many, 132).split_tasks == 0
