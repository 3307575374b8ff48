"""Timing on a device that works asynchronously."""

import statistics
import time

import jax


def median_seconds(
    function, *args, calls: int = 10, repeats: int = 5, wait=jax.block_until_ready
) -> float:
    """Median over repeats of the mean time of a call, with the device kept busy."""
    wait(function(*args))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        wait(result)
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def calls_within(seconds: float, function, *args, wait=jax.block_until_ready) -> int:
    """How many calls, from 1 to 50, take about so long."""
    wait(function(*args))
    begin = time.perf_counter()
    wait(function(*args))
    return int(min(max(seconds / (time.perf_counter() - begin), 1), 50))
