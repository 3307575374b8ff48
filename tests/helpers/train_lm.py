"""Starts examples/train_lm.py with small settings."""

import re

from tests.helpers import processes

SETTINGS = ["--steps=2", "--sequence-length=512", "--document-length=200", "--layers=1"]
SETTINGS += ["--window=70", "--sinks=3", "--devices=4", "--sample-length=8", "--seed=5"]


def start(output, *flags):
    command = ["examples/train_lm.py", *SETTINGS, f"--output={output}", *flags]
    # Compiling is most of the time.
    environment = processes.CPU | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return processes.start(*command, **environment)


def losses(output):
    """The losses of the first and of the last of the two steps."""
    return [float(x) for x in re.search(r"loss: (\S+) at first, (\S+) at last", output).groups()]
