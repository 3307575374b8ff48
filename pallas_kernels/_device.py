"""The device that the current trace is compiled for, and what it can run."""

import functools
import importlib.util

import jax


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
    capability = compute_capability()
    if platform == "gpu" and capability is not None and capability < 8:
        raise NotImplementedError(
            f"implementation='triton' needs an Ampere GPU or newer (compute capability 8.0), "
            f"got {capability}"
        )


def compute_capability() -> float | None:
    """Compute capability of the GPU compiled for, e.g. 9.0; None where it is not known."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None or compiled_platform() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return None if capability is None else float(capability)
