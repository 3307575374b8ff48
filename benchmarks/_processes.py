"""Runs commands in processes, so many at a time: compiling takes most of a benchmark's time."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@dataclasses.dataclass(frozen=True)
class Job:
    """A command of Python that writes a JSON document.

    Attributes:
        benchmark: whose rows it measures.
        row: which; empty for all.
        arguments: of Python.
        part: the JSON.
    """

    benchmark: str
    row: str
    arguments: tuple[str, ...]
    part: Path

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.benchmark} {self.row}".strip()


@dataclasses.dataclass
class Ended:
    """How a job's process ended.

    Attributes:
        status: of the process; None where the time was up.
        text: what it said, on both streams where it failed.
        seconds: from its start.
    """

    job: Job
    status: int | None
    text: str
    seconds: float


class _Started:
    """A job's process and those that it starts, which end together."""

    def __init__(self, job: Job):
        self.job, self.begin = job, time.monotonic()
        self.files = [self._file("out"), self._file("err")]
        self.process = subprocess.Popen(
            [sys.executable, *job.arguments],
            stdout=self.files[0],
            stderr=self.files[1],
            start_new_session=True,
        )

    def _file(self, suffix: str) -> IO[str]:
        return self.job.part.with_suffix(f".{suffix}").open("w+")

    def kill(self) -> None:
        """Ends the process and those that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ended(self, *, status: int | None) -> Ended:
        """What is left of it."""
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        text = texts[0] if status == 0 else f"{texts[0]}{texts[1][-3000:]}"
        return Ended(self.job, status, text, time.monotonic() - self.begin)


def run(jobs: list[Job], *, at_once: int, seconds: float) -> Iterator[Ended]:
    """Starts the jobs in their order and yields each one that has ended.

    When the time is up, kills those that run and yields them too; the others are not started.
    Nothing runs any more once this ends, in whatever way.
    """
    end = time.monotonic() + seconds
    waiting, started = list(jobs), list[_Started]()
    try:
        while started or (waiting and time.monotonic() < end):
            while waiting and len(started) < at_once and time.monotonic() < end:
                started.append(_Started(waiting.pop(0)))
            for each in list(started):
                status = each.process.poll()
                if status is None and time.monotonic() >= end:
                    each.kill()
                elif status is None:
                    continue
                started.remove(each)
                yield each.ended(status=status)
            time.sleep(0.1)
    finally:
        for each in started:
            each.kill()
