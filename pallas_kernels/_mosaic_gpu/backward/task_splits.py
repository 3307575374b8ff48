"""Which tasks of a fused Mosaic GPU backward kernel are split into parts.

At the end of a launch some multiprocessors are idle while the last tasks run. If these are split
into programs of fewer heads or queries each (`tasks`), the launch ends earlier, but each part
has an overhead of its own.
"""

import dataclasses
import functools
import heapq

from pallas_kernels._mosaic_gpu.backward.tasks import BackwardSchedule

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
    devices = [schedule.steps_per_head()]
    has_both = 0 < schedule.halo_key_tiles < schedule.num_key_tiles
    if has_both:  # the first device of a ring takes part in the mean, with a halo that is not seen
        devices.append(schedule.steps_per_head(halo_is_seen=False))
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
        devices: for each kind of device, `BackwardSchedule.steps_per_head`.
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
