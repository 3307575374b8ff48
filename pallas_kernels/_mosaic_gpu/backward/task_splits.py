"""Which tasks of a fused Mosaic GPU backward kernel are split into parts.

At the end of a launch some multiprocessors are idle while the last tasks run. If these are split
into programs of fewer heads or queries each (`tasks`), the launch ends earlier, but each part
has an overhead of its own.
"""

import dataclasses
import functools
import heapq

from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE, BackwardSchedule

MAX_TASKS_PER_SM = 64
"""Above so many tasks for each multiprocessor none is split: the last ones take next to nothing of
the whole time."""


MAX_PARTS = 8
"""Parts of a task at most."""


PROGRAM_OVERHEAD, HANDOFF_COST = 3, 2
"""Costs of the beginning and end of a program, and of handing its sums to the next part, in steps:
7 and about 4 microseconds on an H100 80GB, where a step takes 2.2. Measured with heads of 128, and
used for wider heads too."""


@functools.cache
def split_last_tasks(schedule: BackwardSchedule, num_sms: int) -> BackwardSchedule:
    """The schedule with its last tasks split, where that takes less time.

    Args:
        schedule: without split tasks.
        num_sms: multiprocessors of the GPU.
    """
    if schedule.tasks > MAX_TASKS_PER_SM * num_sms:
        return schedule
    devices = [steps_per_head(schedule)]
    has_both = 0 < schedule.halo_key_tiles < schedule.num_key_tiles
    if has_both:  # the first device of a ring takes part in the mean, with a halo that is not seen
        devices.append(steps_per_head(schedule, halo_is_seen=False))
    # The programs of a halo's keys wait for those of the own keys of the same heads. So all tiles
    # of keys of a head are split, or none.
    counts = {schedule.num_key_tiles} if has_both else {num_sms // 2, num_sms}
    if schedule.halo_last:
        counts = {schedule.halo_tasks}
    by_queries = schedule.sees_all
    if by_queries:  # all tasks are equal: those that are left for some of the multiprocessors
        counts = {schedule.tasks % num_sms or num_sms}
    split_tasks, parts = choose_split(
        devices, schedule.group_size, num_sms, counts, by_queries=by_queries
    )
    return dataclasses.replace(schedule, split_tasks=split_tasks, parts=parts)


def steps_per_head(schedule: BackwardSchedule, *, halo_is_seen: bool = True) -> list[int]:
    """How many tiles of queries see each task's keys if there are no documents.

    Args:
        schedule: of the launch.
        halo_is_seen: False for a ring's first device, whose halo belongs to no sequence.

    Returns:
        A number for each task, in their order.
    """
    key_tiles, heads = range(schedule.num_key_tiles), schedule.batch_kv_heads
    steps = [_steps_of_key_tile(schedule, n, halo_is_seen=halo_is_seen) for n in key_tiles]
    side = schedule.kv_heads_side_by_side
    if schedule.halo_last:
        halo, own = steps[: schedule.halo_key_tiles], steps[schedule.halo_key_tiles :]
        return own[::-1] * heads + halo * heads
    if side is None:
        return steps[::-1] * heads
    sides = [side] * (heads // side) + [heads % side]
    steps = steps[::-1] if schedule.sees_documents else steps
    return [n for side in sides for n in steps for _ in range(side)]


def _steps_of_key_tile(schedule: BackwardSchedule, number: int, *, halo_is_seen: bool) -> int:
    """How many tiles of queries see a tile of keys."""
    begin = number * schedule.key_tile + schedule.offset
    end = min((number + 1) * schedule.key_tile, schedule.num_keys) + schedule.offset
    if end <= 0 and not halo_is_seen:
        return 0
    first, stop = max(begin, 0) // QUERY_TILE, schedule.num_query_tiles
    if schedule.window is not None:
        stop = min((end - 1 + schedule.window) // QUERY_TILE + 1, stop)
    return max(stop - first, 0)


def choose_split(
    devices: list[list[int]],
    group_size: int,
    num_sms: int,
    counts: set[int],
    *,
    by_queries: bool = False,
) -> tuple[int, int]:
    """How many of the last tasks to split, and into how many parts of equally many heads.

    Splits only if the mean simulated time falls by at least 1%.

    Args:
        devices: for each kind of device, `steps_per_head`.
        group_size: heads of a task.
        num_sms: multiprocessors of the GPU.
        counts: how many tasks may be split; all of them may be too.
        by_queries: whether parts have about equally many queries instead.
    """
    num_tasks = len(devices[0])

    def simulated_time(steps_per_head, split_tasks, parts):
        """When the last program ends, if each idle multiprocessor takes the next program."""
        whole, split = (
            steps_per_head[: num_tasks - split_tasks],
            steps_per_head[num_tasks - split_tasks :],
        )
        whole = [n * group_size + PROGRAM_OVERHEAD for n in whole]
        split = [n * group_size // parts + PROGRAM_OVERHEAD + HANDOFF_COST for n in split]
        idle_from = [0] * num_sms
        for cost in (*whole, *split * parts):
            heapq.heapreplace(idle_from, idle_from[0] + cost)
        return max(idle_from)

    def mean_time(split_tasks, parts):
        return sum(simulated_time(steps, split_tasks, parts) for steps in devices) / len(devices)

    best, least = (0, 1), 0.99 * mean_time(0, 1)
    for split_tasks in sorted({n for n in counts if n < num_tasks} | {num_tasks}):
        for parts in range(2, MAX_PARTS + 1):
            if not by_queries and group_size % parts:
                continue
            if (time := mean_time(split_tasks, parts)) < least:
                best, least = (split_tasks, parts), time
    return best
