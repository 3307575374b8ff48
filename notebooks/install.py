"""Installs ring_swa_jax for the accelerator at hand, in the environment of a notebook's kernel.

The notebooks' first cell calls `install`. `python install.py` says with which command.
"""

import glob
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
from importlib import metadata

PROJECT = pathlib.Path(__file__).resolve().parent.parent
# What a kernel may have loaded before, and cannot load anew.
LOADED_ONCE = ("jax", "jaxlib", "numpy", "flax")


def accelerator() -> str | None:
    """The extra of this package that fits the machine: "cuda12", "cuda13", "tpu", or None (CPU)."""
    if glob.glob("/dev/accel*") or os.environ.get("TPU_NAME"):
        return "tpu"
    if shutil.which("nvidia-smi") is None:
        return None
    answer = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
    # The newest CUDA that the driver knows: "CUDA Version: 12.4".
    found = re.search(r"CUDA Version:\s*(\d+)", answer.stdout)
    if answer.returncode or found is None:
        return None
    if has("jax-cuda12-plugin"):  # newer drivers run it too
        return "cuda12"
    return "cuda13" if int(found[1]) >= 13 else "cuda12"


def has(distribution: str) -> bool:
    """Whether a distribution is installed."""
    return version(distribution) is not None


def version(distribution: str) -> str | None:
    """Its version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def command() -> list[str]:
    """The command that installs the package with JAX for this machine."""
    extras = ",".join(filter(None, ("examples", accelerator())))
    return [sys.executable, "-m", "pip", "install", "--quiet", f"{PROJECT}[{extras}]"]


def install() -> None:
    """Installs the package unless it is there, and stops where the runtime must be restarted.

    Raises:
        RuntimeError: a module that this kernel has loaded was replaced by another version.
    """
    if importlib.util.find_spec("ring_swa_jax") is not None:
        return
    loaded = {name: version(name) for name in LOADED_ONCE if name in sys.modules}
    print("installing for", accelerator() or "the CPU", flush=True)
    # pip warns on stderr, which a notebook shows as if the cell had failed.
    subprocess.run(command(), check=True, stderr=subprocess.STDOUT)
    importlib.invalidate_caches()
    stale = [name for name, before in loaded.items() if version(name) != before]
    if stale:
        raise RuntimeError(
            f"{', '.join(stale)} changed while this runtime had it loaded. Restart the runtime "
            "(Runtime > Restart session) and run this cell again."
        )


if __name__ == "__main__":
    print(*command())
