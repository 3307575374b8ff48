"""Takes all published figures that the GPUs of this machine allow: ``python -m benchmarks.all``.

On one GPU those of one GPU, on several those of a sequence that is cut over them, the most
important first. Each row has a process of its own. Many compile at the same time; who times holds
the GPUs alone. JSON, pictures and logs are written to --output as rows end, and a run that
--seconds cuts off leaves what it has. A row that fails is reported, and the others go on.
"""

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks import (
    _model_report,
    _report,
    _ring_report,
    _scaling_report,
    decoding,
    full_causal,
    lengths,
    ring,
    scaling,
)
from benchmarks import _results as results
from benchmarks._gpus import share_machine
from benchmarks._processes import Ended, Job, run
from benchmarks._ring_shapes import LONG_SHAPES
from benchmarks._shapes import ALL
from benchmarks.attention import machine


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """``python -m benchmarks.NAME``, and how its rows are measured by themselves.

    Attributes:
        several: whether it is for several GPUs.
        flag: the option that names rows; empty: one process measures all.
        rows: their names, the most important first.
        chart: draws the picture beside a JSON.
        options: of all its processes.
    """

    several: bool
    flag: str = ""
    rows: tuple[str, ...] = ("",)
    chart: Callable[[Path], None] | None = None
    options: tuple[str, ...] = ()


BENCHMARKS = {
    "attention": Benchmark(False, "--shapes", tuple(ALL), _report.chart, ("--deterministic",)),
    "decoding": Benchmark(False, "--steps", tuple(x.name for x in decoding.STEPS)),
    "lengths": Benchmark(False, "--rows", lengths.ROWS, lengths.chart),
    "small_plans": Benchmark(False),
    "full_causal": Benchmark(True, "--rows", tuple(LONG_SHAPES), full_causal.chart),
    "ring": Benchmark(True, "--shapes", tuple(ring.SHAPES), _ring_report.chart),
    "scaling": Benchmark(True, "--rows", tuple(scaling.ROWS), _scaling_report.chart),
    "model": Benchmark(True, chart=_model_report.chart),
}
"""The most important first, of one GPU and of several."""


def jobs_of(name: str, folder: Path, arguments: argparse.Namespace) -> list[Job]:
    """The processes that measure a benchmark. Files go to ``folder``, which has the locks too."""
    benchmark, jobs = BENCHMARKS[name], []
    for n, row in enumerate(benchmark.rows):
        part = folder / f"{name}-{n}.json"
        flags = [f"--output={part}", f"--lock={folder}", *benchmark.options]
        flags += [benchmark.flag, row] if benchmark.flag else []
        flags += [f"--devices={arguments.devices}"] if benchmark.several else []
        flags += ["--quick"] if arguments.quick else []
        jobs.append(Job(name, row, ("-m", f"benchmarks.{name}", *flags), part))
    return jobs


class Output:
    """The folder of results, brought up to date whenever a job has ended."""

    def __init__(self, folder: Path, jobs: list[Job]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.jobs, self.begin = folder, jobs, time.monotonic()
        self.missing = [job.title for job in jobs]

    def add(self, ended: Ended) -> None:
        """Takes what a job has left, also where it failed."""
        job, how = ended.job, f"in {ended.seconds:.0f} s"
        if ended.status == 0:
            self.missing.remove(job.title)
        else:
            lines = ended.text.strip().splitlines()
            status = "when time was up" if ended.status is None else f"with {ended.status}"
            how = f"ENDED {status}: {lines[-1][:200] if lines else ''}"
        self.say(f"{job.title}: {how}")
        with (self.folder / f"{job.benchmark}.log").open("a") as log:
            log.write(f"\n=== {job.title}: {how}\n{ended.text}")
        try:
            self._merge(job.benchmark)
        except Exception:  # a picture that fails must not end the run
            self.say(traceback.format_exc())

    def _merge(self, name: str) -> None:
        parts = [job.part for job in self.jobs if job.benchmark == name and job.part.exists()]
        documents = [results.read(part) for part in parts]
        if documents:
            whole = results.merged(documents)
            path = results.path_in(self.folder, name, whole["machine"])
            results.write(path, whole)
            if (chart := BENCHMARKS[name].chart) is not None:
                chart(path)

    def say(self, text: str) -> None:
        """A line on the screen and in the log of the whole."""
        line = f"{time.monotonic() - self.begin:6.1f} s  {text}"
        print(line, flush=True)
        with (self.folder / "all.log").open("a") as log:
            log.write(line + "\n")


def main() -> None:
    """Exits with 1 if a row has no result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help=f"in this order, of: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("--seconds", type=float, default=3600, help="after which it ends")
    parser.add_argument("--output", type=Path, required=True, help="folder for all that is found")
    parser.add_argument("--devices", type=int, help="how many; default: all GPUs, or 2 of a CPU")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(max((os.cpu_count() or 1) // 2, 1), 16),
        help="at a time; default: half as many as cores, at most 16",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a smoke test")
    arguments = parser.parse_args()
    share_machine()
    jax.config.update("jax_num_cpu_devices", arguments.devices or 2)
    if jax.default_backend() == "cpu" and not arguments.quick:
        parser.error("on a CPU there is only --quick")
    arguments.devices = arguments.devices or jax.device_count()
    several = arguments.devices > 1
    names = arguments.only or [name for name, x in BENCHMARKS.items() if x.several == several]
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"no benchmark is named {', '.join(sorted(unknown))}")
    # As a signal it would leave the processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as folder:
        jobs = [job for name in names for job in jobs_of(name, Path(folder), arguments)]
        output = Output(arguments.output, jobs)
        output.say(f"{machine()}, {arguments.devices} of {jax.device_count()} devices")
        for ended in run(jobs, at_once=arguments.processes, seconds=arguments.seconds):
            output.add(ended)
        output.say(f"{len(jobs) - len(output.missing)} of {len(jobs)} jobs have results")
        if output.missing:
            output.say(f"failed, cut off or not started: {', '.join(output.missing)}")
    sys.exit(bool(output.missing))


if __name__ == "__main__":
    main()
