"""Where the time of a profiled step goes, read from the trace that JAX writes (Chrome's JSON)."""

import collections
import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

CLASSES = {
    "attention, ours": r"ring_swa|mosaic",
    "attention, cuDNN": r"cudnn|sdpa|fmha",
    "collectives": r"nccl|MemcpyP2P",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas",
    "copies": r"memcpy|memset|copy|transpose|concatenate|pad|slice",
    "other elementwise": r"",
}
"""Patterns of kernel names; a kernel is of the first class that it matches."""
COLLECTIVES = "collectives"


class Kernel(NamedTuple):
    """One execution on a device, in microseconds."""

    name: str
    begin: float
    end: float


def kind_of(name: str) -> str:
    """The class of a kernel."""
    return next(kind for kind, x in CLASSES.items() if re.search(x, name, re.IGNORECASE))


def kernels_of(folder: Path) -> dict[str, list[Kernel]]:
    """By device, all that ran on its streams."""
    [path] = folder.glob("plugins/profile/*/*.trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    processes: dict[int, str] = {}
    streams: set[tuple[int, int]] = set()
    for event in events:
        if event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("name") == "thread_name" and event["args"]["name"].startswith("Stream"):
            streams.add((event["pid"], event["tid"]))
    found: dict[str, list[Kernel]] = collections.defaultdict(list)
    for event in events:
        if event.get("ph") != "X" or (event["pid"], event["tid"]) not in streams:
            continue
        kernel = Kernel(event["name"], event["ts"], event["ts"] + event.get("dur", 0))
        found[processes[event["pid"]]].append(kernel)
    return found


def covered(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda x: x.begin):
        total += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    return total


def of_device(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds of each class, of collectives beside which nothing ran, and without work."""
    found = dict.fromkeys(CLASSES, 0.0)
    for kernel in kernels:
        found[kind_of(kernel.name)] += kernel.end - kernel.begin
    work = [x for x in kernels if kind_of(x.name) != COLLECTIVES]
    busy, wall = covered(kernels), max(x.end for x in kernels) - min(x.begin for x in kernels)
    found |= {"collectives, exposed": busy - covered(work), "idle": wall - busy, "wall": wall}
    return {kind: microseconds / 1e3 for kind, microseconds in found.items()}


def summary(folder: Path) -> dict[str, Any]:
    """Milliseconds by class, the mean and the most of the devices, and the longest kernels."""
    devices = [of_device(x) for x in kernels_of(folder).values()]
    names: dict[str, float] = collections.defaultdict(float)
    for kernels in kernels_of(folder).values():
        for kernel in kernels:
            names[kernel.name] += (kernel.end - kernel.begin) / 1e3 / len(devices)
    longest = sorted(names.items(), key=lambda x: -x[1])
    return {
        "mean": {kind: sum(x[kind] for x in devices) / len(devices) for kind in devices[0]},
        "most": {kind: max(x[kind] for x in devices) for kind in devices[0]},
        "kernels": {name[:120]: took for name, took in longest[:25]},
    }


def table(title: str, profile: dict[str, Any]) -> str:
    """Lines of one profile."""
    if "reason" in profile:
        return f"\n{title}: {profile['reason']}"
    mean, most = profile["mean"], profile["most"]
    lines = [f"\n{title}: ms, mean | most of a device"]
    lines += [f"  {kind:22s} {mean[kind]:9.1f} | {most[kind]:9.1f}" for kind in mean]
    longest = list(profile["kernels"].items())[:12]
    return "\n".join([*lines, *(f"    {took:9.1f}  {name}" for name, took in longest)])
