"""Starts processes that work together, and collects what they say."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPU = {"JAX_PLATFORMS": "cpu"}
GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the test's own process has memory there too


def free_port():
    """A port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments, **environment):
    """Python with these arguments, in the root of the checkout."""
    drop = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS")
    inherited = {k: v for k, v in os.environ.items() if k not in drop}
    # The packages of this checkout, also where they are not installed or another checkout's are.
    paths = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
    inherited["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(processes, timeout=240):
    """[(exit status, stdout, stderr)] of all processes; none is left behind."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def succeed(processes, timeout=240):
    """What each wrote to stdout, all of which must succeed."""
    found = outputs(processes, timeout)
    for status, out, err in found:
        assert status == 0, out + err[-3000:]
    return [out for _, out, _ in found]
