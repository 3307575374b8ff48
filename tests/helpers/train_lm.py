"""Starts examples/train_lm.py with small settings."""

import re

from tests.helpers import processes

SETTINGS = ["--steps=2", "--sequence-length=512", "--document-length=200", "--layers=1"]
SETTINGS += ["--window=70", "--sinks=3", "--devices=4", "--sample-length=8", "--seed=5"]
SETTINGS += ["--vocabulary=300", "--short-share=0"]


def start(folder, *flags):
    """The example, which leaves all that it writes in a folder."""
    command = ["examples/train_lm.py", *SETTINGS, f"--folder={folder}", *flags]
    return start_as(*command)


def resume(folder, *flags):
    """Goes on with the run of a folder."""
    return start_as("examples/train_lm.py", f"--resume={folder}", "--sample-length=8", *flags)


def start_as(*command):
    """A script; compiling is most of the time."""
    environment = processes.CPU | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return processes.start(*command, **environment)


def losses(output):
    """The losses of the first step and of the last one."""
    return [float(x) for x in re.search(r"loss: (\S+) at first, (\S+) at last", output).groups()]
