"""One job of the whole-model benchmark, in a process of its own."""

import json
import os
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from benchmarks._gpus import connect, hold
from benchmarks._model_check import check
from benchmarks._model_jobs import Job
from benchmarks._model_profile import summary
from benchmarks.attention import reason_of

DOES_NOT_FIT = "does not fit"
FRACTION = 0.92
"""Of a GPU's memory that a program may have; the rest is NCCL's, cuBLAS's and the kernels'."""


def memory_limit() -> int | None:
    """Bytes that a program may have on a device, where it says how many it has."""
    found = jax.devices()[0].memory_stats() or {}
    return found.get("bytes_limit")


def run(job: Job, lock: Path, gpus: range, *, quick: bool) -> dict[str, Any]:
    """Compiles a job, and times it where it fits: what was found."""
    training = job.training(quick=quick)
    step = training.lower(job.contender, job.batch, job.length).compile()
    memory, limit = step.memory(), memory_limit()
    found: dict[str, Any] = {"compile": step.seconds, "memory": memory}
    if limit is not None and memory["all"] > limit:
        sizes = f"{memory['all'] / 2**30:.1f} of {limit / 2**30:.1f} GiB"
        return found | {"reason": f"{DOES_NOT_FIT}: {sizes}"}
    if job.steps == 0:
        return found
    init = training.compile_init()
    connect(training.mesh)
    words = training.words(job.batch, job.length)
    hold(lock, gpus)
    state = init()
    *state, loss, norm = step.call(*state, *words)
    found |= {"loss": float(loss), "gradient_norm": float(norm)}
    times: list[float] = []
    while len(times) < job.steps and sum(times) < 15:
        begin = time.perf_counter()
        *state, loss, _ = step.call(*state, *words)
        jax.block_until_ready((state, loss))
        times.append(time.perf_counter() - begin)
    stats = [x.memory_stats() or {} for x in training.mesh.devices.flat]
    found |= {
        "times": times,
        "seconds": statistics.median(times),
        "last_loss": float(loss),
        "peak": max(x.get("peak_bytes_in_use", 0) for x in stats),
    }
    if job.profile:
        found["profile"] = _profile(lambda: step.call(*state, *words))
    return found


def _profile(call: Any) -> dict[str, Any]:
    """Where the time of a call goes; a reason where the profiler fails."""
    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level = 0
    try:
        with tempfile.TemporaryDirectory() as trace:
            with jax.profiler.trace(trace, profiler_options=settings):
                jax.block_until_ready(call())
            return summary(Path(trace))
    except Exception as error:  # the times are worth having without it
        traceback.print_exc()
        return {"reason": reason_of(error)}


def in_this_process(text: str, lock: Path, gpus: range, output: Path, *, quick: bool) -> None:
    """Runs the job that the parent wrote as JSON, and writes what was found."""
    job = Job(**json.loads(text))
    try:
        found = (check if job.check else run)(job, lock, gpus, quick=quick)
    except Exception as error:  # a contender may fail in any way; the table says how
        traceback.print_exc()
        found = {"reason": reason_of(error)}
    output.write_text(json.dumps(found))
    # The memory goes back before the next process has its turn.
    os._exit(0)
