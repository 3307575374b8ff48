"""How processes share GPUs: several compile, one times, and none takes memory in advance."""

import fcntl
import functools
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def share_memory() -> None:
    """Lets this process and those that it starts take GPU memory only as they need it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def hold(folder: Path | None, gpus: Iterable[int]) -> None:
    """Waits until no other process is on these GPUs; they are this process's until it ends.

    Until then, as only the end of a process gives its memory back. ``folder`` holds a lock file for
    each GPU; None: nobody else is here. Call this when all is compiled.
    """
    if folder is not None:
        for gpu in sorted(gpus):  # always in the same order
            _hold_one(folder / f"gpu-{gpu}")


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
