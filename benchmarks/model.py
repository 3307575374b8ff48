"""Times training steps of whole models on the GPUs that are here: ``python -m benchmarks.model``.

Decoders (`benchmarks._model_sizes`) with the attention of this library beside the same decoders
with cuDNN behind an all-gather of the keys, and behind an all-to-all of the heads, in every layer
(`benchmarks._model_contenders`). Parameters, gradients and the optimizer's moments are cut over all
devices for all of them, and so are the tokens. Each job (`benchmarks._model_jobs.plan`) is compiled
in a process of its own, several at the same time, and timed while no other is on its GPUs. The
first jobs compare every model's loss and gradients at 4096 tokens. Writes JSON and a chart as it
goes, and ends after --seconds with what it has.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks import _model_profile, _model_report, _model_tables
from benchmarks._gpus import share_machine
from benchmarks._model_contenders import CONTENDERS
from benchmarks._model_jobs import Job, plan
from benchmarks._model_run import DOES_NOT_FIT, FRACTION, in_this_process
from benchmarks._model_sizes import MODELS
from benchmarks._results import RESULTS, path_in, read
from benchmarks.attention import machine


@dataclasses.dataclass
class Started:
    """A job's process."""

    job: Job
    process: subprocess.Popen[bytes]
    output: Path

    def found(self) -> dict[str, Any]:
        """What it wrote; a reason where it wrote nothing."""
        if self.output.exists():
            return json.loads(self.output.read_text())
        return {"reason": f"its process ended with {self.process.returncode}"}


class Runner:
    """Starts jobs in processes, so many at a time, and collects what they find."""

    def __init__(self, arguments: argparse.Namespace, devices: int, folder: Path):
        self.arguments, self.devices, self.folder = arguments, devices, folder
        self.end = time.monotonic() + arguments.seconds
        self.started: list[Started] = []
        self.count = 0

    def start(self, job: Job) -> None:
        """Starts one; jobs of one GPU take another GPU each time."""
        first = self.count % self.devices if job.devices == 1 else 0
        gpus = range(first, first + job.devices)
        output = self.folder / f"{self.count}.json"
        self.count += 1
        command = [sys.executable, "-m", "benchmarks.model"]
        command += [f"--lock={self.arguments.lock or self.folder}"]
        command += [f"--job={json.dumps(dataclasses.asdict(job))}"]
        command += ["--gpus", str(gpus.start), str(gpus.stop), f"--output={output}"]
        command += ["--quick"] if self.arguments.quick else []
        known = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = known.split(",") if known else [str(n) for n in range(self.devices)]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(names[n] for n in gpus),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": str(FRACTION),
        }
        if job.profile:  # kernels of a CUDA graph would be one event
            flags = os.environ.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
        process = subprocess.Popen(command, env=environment)
        self.started.append(Started(job, process, output))

    def finished(self) -> list[Started]:
        """Those that have ended by themselves since the last call; when time is up, it ends all."""
        if not self.has_time():
            late = [each for each in self.started if each.process.poll() is None]
            for each in late:
                each.process.kill()
                each.process.wait()
            self.started = [each for each in self.started if each not in late]
        done = [each for each in self.started if each.process.poll() is not None]
        self.started = [each for each in self.started if each not in done]
        return done

    def has_time(self) -> bool:
        """Whether another job may be started."""
        return time.monotonic() < self.end


class Results:
    """What was found, written whenever there is more."""

    def __init__(self, arguments: argparse.Namespace, where: dict[str, Any]):
        self.arguments, self.where = arguments, where
        self.rows: list[dict[str, Any]] = []
        self.checks: dict[str, Any] = {}
        self.too_long: dict[tuple[Any, ...], int] = {}

    def wants(self, job: Job) -> bool:
        """Whether a job may fit, and has not failed its check by now."""
        too_long = job.length >= self.too_long.get(job.family, job.length + 1)
        return job.check or not (too_long or self._failed(job))

    def _failed(self, job: Job) -> bool:
        check = self.checks.get(job.model, {})
        return "reason" in check or "reason" in check.get(job.contender, {})

    def add(self, job: Job, found: dict[str, Any]) -> None:
        """Takes, prints and writes."""
        quick = self.arguments.quick
        if job.check:
            self.checks[job.model] = found
            print("check", job.model, json.dumps(found), flush=True)
        else:
            if found.get("reason", "").startswith(DOES_NOT_FIT):
                longest = self.too_long.get(job.family, job.length)
                self.too_long[job.family] = min(longest, job.length)
            self.rows.append({"job": dataclasses.asdict(job)} | found)
            print(_model_report.line(self.rows[-1], self.rows, quick=quick), flush=True)
        if "profile" in found:
            title = f"{job.model}, {job.contender}, one step"
            print(_model_profile.table(title, found["profile"]), flush=True)
        for row in self.rows:  # some may have been timed before their check ended
            if self._failed(_model_report.job_of(row)):
                row["reason"] = "failed its check"
        _model_report.write(self.arguments.output, self.where, self.rows, self.checks, quick=quick)


def profiled(job: Job, arguments: argparse.Namespace, devices: int) -> bool:
    """Whether a job is one that --profile asks for."""
    whole = (job.seq, job.batch, job.length) == (devices, 1, 128 * 1024)
    return job.contender in arguments.profile and whole


def compare(arguments: argparse.Namespace, devices: int, where: dict[str, Any]) -> None:
    """Runs the jobs in their order, prints and writes."""
    jobs = plan(arguments.models, devices)
    if arguments.quick:
        jobs = [dataclasses.replace(job, length=max(job.length // 512, 128)) for job in jobs]
    jobs = [job for job in jobs if job.check or job.contender in arguments.only]
    waiting = [dataclasses.replace(x, profile=profiled(x, arguments, devices)) for x in jobs]
    waiting = waiting[: arguments.jobs]
    results = Results(arguments, where)
    with tempfile.TemporaryDirectory() as name:
        runner = Runner(arguments, devices, Path(name))
        while waiting or runner.started:
            waiting = waiting if runner.has_time() else []
            while waiting and len(runner.started) < arguments.workers:
                job = waiting.pop(0)
                if results.wants(job):
                    runner.start(job)
            for each in runner.finished():
                results.add(each.job, each.found())
            time.sleep(0.1)
    if arguments.output.exists():
        _model_report.chart(arguments.output)
        print(f"wrote {arguments.output} and its picture")


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--devices", type=int, help="how many; default: all GPUs, or 4 of a CPU")
    parser.add_argument("--seconds", type=float, default=3600, help="after which it ends")
    parser.add_argument("--workers", type=int, default=8, help="processes at a time")
    parser.add_argument("--jobs", type=int, help="at most so many, the first ones")
    parser.add_argument(
        "--profile",
        nargs="*",
        choices=list(CONTENDERS),
        default=[],
        help="where the time of their steps at 128k tokens on all devices goes",
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: a smoke test")
    parser.add_argument("--output", type=Path, help="JSON to write; default: benchmarks/results/")
    parser.add_argument("--table", type=Path, help="only print an earlier JSON as Markdown")
    parser.add_argument(
        "--merge",
        nargs=2,
        type=Path,
        metavar=("JSON", "LATER"),
        help="only add what a later JSON has to another one",
    )
    parser.add_argument("--lock", type=Path, help="folder of locks, one for each GPU")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--gpus", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join(_model_tables.tables(read(arguments.table)["rows"])))
        return
    if arguments.merge:
        _model_report.merge(*arguments.merge)
        return
    # This process only counts the GPUs; the memory is for those that it starts.
    share_machine()
    jax.config.update("jax_num_cpu_devices", arguments.devices or 4)
    if arguments.job:
        in_this_process(
            arguments.job, arguments.lock, range(*arguments.gpus), arguments.output,
            quick=arguments.quick,
        )  # fmt: skip
    if jax.default_backend() == "cpu" and not arguments.quick:
        parser.error("on a CPU there is only --quick")
    devices = arguments.devices or jax.device_count()
    where = machine() | {"devices": devices}
    print(where, flush=True)
    if arguments.output is None:
        arguments.output = path_in(RESULTS, "model", where)
    compare(arguments, devices, where)


if __name__ == "__main__":
    main()
