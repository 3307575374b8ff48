"""How processes share a machine: several compile, one times, and none is in another's way."""

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def share_machine() -> None:
    """Lets this process and those that it starts take GPU memory only as they need it.

    Until `hold`, they compile on some of the cores alone.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    _move_to(cores_for_compiling(os.cpu_count() or 1))


def cores_for_compiling(count: int) -> range:
    """The cores of a machine with so many that compile while another process times.

    Where there are many cores, a quarter of them starts the kernels of the process that times: on
    four GPUs a layer of 0.6 ms took 0.8 ms while other processes compiled on all cores.
    """
    return range(count - count // 4 if count >= 16 else count)


def _move_to(cores: Iterable[int]) -> None:
    """All threads of this process, and those that they start, to these cores."""
    if sys.platform != "linux":
        return
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # one that has just ended, a core that is not ours
            os.sched_setaffinity(int(thread), cores)


def hold(folder: Path | None, gpus: Iterable[int]) -> None:
    """Waits until no other process is on these GPUs; they are this process's until it ends.

    Until then, as only the end of a process gives its memory back. ``folder`` holds a lock file for
    each GPU; None: nobody else is here. Call this when all is compiled.
    """
    cores = range(os.cpu_count() or 1)
    if folder is not None:
        for gpu in sorted(gpus):  # always in the same order
            _hold_one(folder / f"gpu-{gpu}")
        others = cores_for_compiling(len(cores))
        cores = cores[len(others) :] or cores
    _move_to(cores)


@functools.cache
def _hold_one(path: Path) -> None:
    # Not a file object, which Python would close before the process ends.
    fcntl.flock(os.open(path, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)


def connect(mesh: Mesh) -> None:
    """Lets the devices of a mesh meet, before anything is timed."""
    with jax.set_mesh(mesh):
        ones = jax.device_put(
            np.ones(mesh.size, np.float32), NamedSharding(mesh, P(mesh.axis_names))
        )
        jax.block_until_ready(jax.jit(jnp.sum)(ones))


def clocks() -> list[str]:
    """Clock, temperature and power of each NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=clocks.sm,temperature.gpu,power.draw"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
