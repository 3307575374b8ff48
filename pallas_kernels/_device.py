"""The device that the current trace is compiled for, and what it can run."""

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


def multiprocessors() -> int:
    """How many multiprocessors the GPU compiled for has; a Hopper's 132 if it is not here."""
    here = jax.devices()[0]
    return getattr(here, "core_count", 132) if here.platform == "gpu" else 132
