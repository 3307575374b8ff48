"""What a device, and a version of JAX, can run, and which inputs the kernels take."""

import functools
import importlib.util

import jax
from jax import Array

from pallas_kernels._device import compiled_platform, compute_capability


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


def check_head_dims(implementation: str, query: Array, value: Array) -> None:
    """Checks the sizes of heads.

    Raises:
        NotImplementedError: one is not a multiple of 16 up to 256; names it.
    """
    for name, dim in (("q and k", query.shape[-1]), ("v", value.shape[-1])):
        if dim % 16 or dim > 256:
            raise NotImplementedError(
                f"implementation={implementation!r} takes head dims that are multiples of 16 up to "
                f"256, got {dim} of {name}"
            )
