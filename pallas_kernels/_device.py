"""The device that the current trace is compiled for, and what it can run."""

import functools
import importlib.util
import math
import re

import jax

HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


def compiled_platform() -> str:
    """Its platform: "cpu", "gpu" or another.

    The abstract device of the current mesh where there is one, which a compile for another
    machine sets, else the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else None
    platform = platform or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def interprets(implementation: str) -> bool:
    """Whether an implementation runs in Pallas' interpreter here, which knows no check_vma."""
    return implementation == "triton" and compiled_platform() == "cpu"


@functools.cache
def has_triton() -> bool:
    """Whether this JAX comes with Pallas-Triton, which is deprecated and will leave it one day."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def check_triton() -> None:
    """Checks for Pallas-Triton and a device for it.

    Raises:
        NotImplementedError: one of them is missing.
    """
    if not has_triton():
        raise NotImplementedError(
            f"implementation='triton' needs Pallas-Triton, which jax {jax.__version__} has not"
        )
    platform = compiled_platform()
    if platform not in ("cpu", "gpu"):
        raise NotImplementedError(f"implementation='triton' runs on GPUs, not on {platform!r}")
    if platform == "gpu" and compute_capability() < 8:
        raise NotImplementedError(
            "implementation='triton' needs an NVIDIA GPU from Ampere on (compute capability 8.0), "
            f"this one has {compute_capability()}"
        )


def compute_capability() -> float:
    """Compute capability of the GPU compiled for, e.g. 9.0; 0 for one that is not NVIDIA's.

    For a GPU that is not here it is 9.0 if its name is that of a Hopper, else infinite: what it
    is worth, whoever compiles for it knows.
    """
    here = jax.devices()[0]
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.device_kind != here.device_kind:
        return 9.0 if HOPPER.search(device.device_kind) else math.inf
    capability = str(getattr(here, "compute_capability", 0))
    return 0.0 if capability.startswith("gfx") else float(capability)


def check_mosaic_gpu() -> None:
    """Checks for a Mosaic GPU backend of Pallas that the kernels know, and for a Hopper GPU.

    Raises:
        NotImplementedError: one of them is missing.
    """
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            "implementation='mosaic_gpu' needs the Mosaic GPU of jax 0.11 or newer, "
            f"this is jax {jax.__version__}"
        )
    platform = compiled_platform()
    if platform != "gpu":
        raise NotImplementedError(
            f"implementation='mosaic_gpu' runs on Hopper GPUs, not on {platform!r}"
        )
    if compute_capability() != 9.0:
        raise NotImplementedError(
            "implementation='mosaic_gpu' needs a Hopper GPU (compute capability 9.0), "
            f"this one has {compute_capability()}"
        )


def multiprocessors() -> int:
    """How many multiprocessors the GPU compiled for has; a Hopper's 132 if it is not here."""
    here = jax.devices()[0]
    return getattr(here, "core_count", 132) if here.platform == "gpu" else 132
