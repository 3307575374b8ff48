"""What the whole-model benchmark runs, in which order, and one such job in a process of its own."""

import contextlib
import dataclasses
import fcntl
import json
import os
import statistics
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks._model_contenders import ALL_GATHER, CONTENDERS, OURS
from benchmarks._model_decoder import Decoder
from benchmarks._model_profile import summary
from benchmarks._model_sharding import AXES
from benchmarks._model_sizes import MODELS, ModelSize, tiny
from benchmarks._model_step import Training
from benchmarks.attention import difference, reason_of

DOES_NOT_FIT = "does not fit"
FRACTION = 0.92
"""Of a GPU's memory that a program may have; the rest is NCCL's, cuBLAS's and the kernels'."""
MOST_OFF = 0.2
"""By which a parameter's bfloat16 gradient may differ from ours, as the norm of the difference over
that of the gradient."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A training step to be measured.

    Attributes:
        model: its name.
        contender: whose attention.
        data: devices that cut the batch.
        seq: devices that cut the sequence.
        batch: sequences in all.
        length: tokens of each.
        steps: how many are timed; 0: the program is compiled and its memory counted.
        profile: whether one more step is taken apart.
    """

    model: str
    contender: str
    data: int
    seq: int
    batch: int
    length: int
    steps: int = 3
    profile: bool = False

    @property
    def devices(self) -> int:
        """How many."""
        return self.data * self.seq

    @property
    def family(self) -> tuple[Any, ...]:
        """What jobs have in common that differ in length alone."""
        return self.model, self.contender, self.data, self.seq, self.batch

    def training(self, *, quick: bool, layers: int | None = None) -> Training:
        """The model on the job's mesh; ``quick``: a tiny one."""
        size: ModelSize = MODELS[self.model]
        size = tiny(size) if quick else size
        size = size if layers is None else dataclasses.replace(size, layers=layers)
        shape = (self.data, self.seq)
        kinds = (AxisType.Auto,) * 2
        mesh = jax.make_mesh(shape, AXES, kinds, devices=jax.devices()[: self.devices])
        return Training(Decoder(size), mesh)


def plan(models: list[str], devices: int) -> list[Job]:
    """All jobs, what matters most first.

    64k tokens on all devices; as many tokens a device on one; 128k; the same sequence in a batch
    as large as the devices; two axes; two devices; then longer ones, whose memory alone is
    counted, and shorter ones.
    """
    k = 1024

    def over(contenders, data, seq, batch, length, steps=3):
        return [Job(m, c, data, seq, batch, length, steps) for m in models for c in contenders]

    every, alone = list(CONTENDERS), [OURS, ALL_GATHER]
    jobs = over(every, 1, devices, 1, 64 * k)
    jobs += over(alone, 1, 1, 1, 64 * k // devices)
    jobs += over(every, 1, devices, 1, 128 * k)
    jobs += over([OURS], 1, 1, 1, 64 * k) + over([OURS], 1, devices, devices, 64 * k)
    if devices > 2:
        jobs += over(every, 2, devices // 2, 2, 64 * k)
        jobs += over(every, 1, 2, 1, 64 * k)
    for length in (256, 512, 1024, 2048):
        jobs += over(every, 1, devices, 1, length * k, steps=0)
    for length in (128, 256):
        jobs += over(alone, 1, 1, 1, length * k, steps=0)
    jobs += over([OURS], 1, devices, 1, 256 * k, steps=2)
    jobs += over(every, 1, devices, 1, 32 * k) + over(alone, 1, 1, 1, 32 * k)
    return list(dict.fromkeys(jobs))


@contextlib.contextmanager
def alone_on(folder: Path, gpus: range) -> Iterator[None]:
    """Waits until no other job is timed on these GPUs; always in the same order."""
    with contextlib.ExitStack() as stack:
        for gpu in gpus:
            lock = stack.enter_context((folder / f"gpu-{gpu}").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    with alone_on(folder, gpus):
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


def check(job: Job, folder: Path, gpus: range, *, quick: bool) -> dict[str, Any]:
    """Loss and gradients of one pattern of layers by all contenders, against those of ours.

    Returns:
        For each contender its loss, and how far its gradients are off; or the reason why not.
    """
    training = job.training(quick=quick, layers=MODELS[job.model].period)

    def lowered(name):
        return _or_error(lambda: training.lower_gradients(name, job.batch, job.length))

    def compiled(program):
        return program if isinstance(program, Exception) else _or_error(program.compile)

    programs = {name: lowered(name) for name in CONTENDERS}
    with ThreadPoolExecutor(len(programs)) as pool:
        programs = dict(zip(programs, pool.map(compiled, programs.values()), strict=True))
    init = training.compile_init()
    found: dict[str, Any] = {}
    with alone_on(folder, gpus):
        parameters, _ = init()
        words = training.words(job.batch, job.length)
        expected = None
        for name, program in programs.items():
            result = program
            if not isinstance(program, Exception):
                result = _or_error(lambda call=program.call: call(parameters, *words))
            if isinstance(result, Exception):
                found[name] = {"reason": reason_of(result)}
                continue
            loss, gradients = result
            expected = gradients if expected is None else expected
            off, where = max(_differences(gradients, expected))
            found[name] = {"loss": float(loss), "off": off, "most in": where}
            if not off < MOST_OFF:  # NaN too
                found[name]["reason"] = f"its gradients are off ours by {off:.2g} in {where}"
    return found


def _or_error(function: Any) -> Any:
    """What it returns, or what it raises, printed; a contender may fail in any way."""
    try:
        return function()
    except Exception as error:
        traceback.print_exc()
        return error


def _differences(gradients: Any, expected: Any) -> Iterator[tuple[float, str]]:
    """The relative norm of a difference of every parameter's gradient, and the parameter."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(gradients)
    for (path, leaf), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        yield difference(leaf, other), jax.tree_util.keystr(path)


def in_this_process(text: str, folder: Path, gpus: range, output: Path, *, quick: bool) -> None:
    """Runs the job that the parent wrote as JSON, and writes what was found."""
    document = json.loads(text)
    checks = document.pop("check", False)
    job = Job(**document)
    try:
        if checks:
            found = check(job, folder, gpus, quick=quick)
        else:
            found = run(job, folder, gpus, quick=quick)
    except Exception as error:  # a contender may fail in any way; the table says how
        traceback.print_exc()
        found = {"reason": reason_of(error)}
    output.write_text(json.dumps(found))
    # The memory goes back before the next process has its turn.
    os._exit(0)
