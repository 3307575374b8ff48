"""Timing on a device that works asynchronously."""

import random
import statistics
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

import jax

Key = TypeVar("Key", bound=Hashable)


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


def _sample(calls: int, program: Callable[..., Any], *args: Any) -> float:
    if calls > 1:
        jax.block_until_ready(program(*args))
    begin = time.perf_counter()
    for _ in range(calls):
        result = program(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls


def in_turns(
    programs: dict[Key, tuple[Callable[..., Any], tuple[Any, ...]]], *, rounds: int, seconds: float
) -> tuple[dict[Key, list[float]], dict[Key, Exception]]:
    """Seconds of a call of each program in each round, and what those raised that have none.

    Each round has another order: a GPU's clock depends on what it has just done. A round takes
    about ``seconds`` for each program; a program is given with its arguments. One that takes longer
    by itself is not called to warm up.
    """
    times: dict[Key, list[float]] = {}
    raised: dict[Key, Exception] = {}
    samples: dict[Key, Callable[[], float]] = {}

    def attempt(key: Key, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:  # a contender may fail in any way; the tables say how
            raised[key] = error
            samples.pop(key, None)
            times.pop(key, None)

    for key, (program, args) in programs.items():
        calls = attempt(key, partial(calls_within, seconds, program, *args))
        if calls is not None:
            samples[key] = partial(_sample, calls, program, *args)
            times[key] = []
    order = random.Random(0)
    for _ in range(rounds):
        for key in order.sample(list(samples), len(samples)):
            sample = attempt(key, samples[key])
            if sample is not None:
                times[key].append(sample)
    return times, raised


def median_of(times: list[float] | None) -> float | None:
    """None where there are no times."""
    return statistics.median(times) if times else None


def ratio_quartiles(times: list[float], base: list[float]) -> tuple[float, float, float] | None:
    """Quartiles of times over others, round by round; None where there are too few."""
    if len(times) < 2 or len(times) != len(base):
        return None
    ratios = [x / y for x, y in zip(times, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high
