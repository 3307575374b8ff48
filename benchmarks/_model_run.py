"""One job of the whole-model benchmark, in a process of its own."""

import json
import os
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks._model_check import check
from benchmarks._model_jobs import Job, hold
from benchmarks._model_profile import summary
from benchmarks._model_sharding import AXES
from benchmarks._model_step import Training
from benchmarks.attention import reason_of

DOES_NOT_FIT = "does not fit"
FRACTION = 0.92
"""Of a GPU's memory that a program may have; the rest is NCCL's, cuBLAS's and the kernels'."""


def _connect(training: Training) -> None:
    """Lets the devices meet before anything is timed."""
    with jax.set_mesh(training.mesh):
        cut = NamedSharding(training.mesh, P(AXES))
        ones = jax.device_put(np.ones(training.mesh.size, np.float32), cut)
        jax.block_until_ready(jax.jit(jnp.sum)(ones))


def memory_limit() -> int | None:
    """Bytes that a program may have on a device, where it says how many it has."""
    found = jax.devices()[0].memory_stats() or {}
    return found.get("bytes_limit")


def run(job: Job, folder: Path, gpus: range, *, quick: bool) -> dict[str, Any]:
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
    _connect(training)
    words = training.words(job.batch, job.length)
    hold(folder, gpus)
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
        found["profile"] = _profile(lambda: step.call(*state, *words), folder)
    return found


def _profile(call: Any, folder: Path) -> dict[str, Any]:
    """Where the time of a call goes; a reason where the profiler fails."""
    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level = 0
    trace = folder / f"trace-{os.getpid()}"
    try:
        with jax.profiler.trace(str(trace), profiler_options=settings):
            jax.block_until_ready(call())
        return summary(trace)
    except Exception as error:  # the times are worth having without it
        traceback.print_exc()
        return {"reason": reason_of(error)}


def in_this_process(text: str, folder: Path, gpus: range, output: Path, *, quick: bool) -> None:
    """Runs the job that the parent wrote as JSON, and writes what was found."""
    job = Job(**json.loads(text))
    try:
        found = (check if job.check else run)(job, folder, gpus, quick=quick)
    except Exception as error:  # a contender may fail in any way; the table says how
        traceback.print_exc()
        found = {"reason": reason_of(error)}
    output.write_text(json.dumps(found))
    # The memory goes back before the next process has its turn.
    os._exit(0)
