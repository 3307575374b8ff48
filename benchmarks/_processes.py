"""Runs `benchmarks.attention` in several processes, one shape each: compiling takes most time."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks._report import Row


def rows_by_shape(
    shapes: list[str], names: list[str], arguments: argparse.Namespace
) -> Iterator[list[Row]]:
    """The rows of each shape, in the order of ``shapes``; ``names`` are those of the contenders.

    At most ``arguments.processes`` run at once. They time in turns, under one lock.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.processes) as pool:

        def run(shape: str) -> list[Row]:
            output = Path(folder) / f"{shape}.json"
            options = ["--shapes", shape, "--output", str(output), "--lock", f"{folder}/lock"]
            if arguments.quick:
                options.append("--quick")
            command = [sys.executable, "-m", "benchmarks.attention", *options, "--only", *names]
            subprocess.run(command, check=True, stdout=subprocess.PIPE)
            entries = json.loads(output.read_text())["rows"]
            fields = ("shape", "name", "ours", "forward", "both", "reason")
            return [Row(**{field: entry[field] for field in fields}) for entry in entries]

        yield from pool.map(run, shapes)
