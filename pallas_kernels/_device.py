"""The device that the current trace is compiled for, and what it offers a kernel."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of GPUs that are compiled for without being here only the name is known. The first pattern that
# is found in the name counts.
CAPABILITIES = (
    (r"\bG?H(100|200)\b|\bH(20|800)\b", 9.0),
    (r"\bG?B300\b", 10.3),
    (r"\bG?B[12]00\b", 10.0),
    (r"\bGB10\b", 12.1),
    (r"\bThor\b", 11.0),
    (r"\bQuadro RTX\b|\bTITAN RTX\b|\bRTX 20\d\d\b|\bGTX 16\d\d\b|\bT\d+G?\b", 7.5),
    (r"\bAda\b|\bRTX 40\d\d\b|\bL(2|4|20|40[SG]?)\b", 8.9),
    (r"\bRTX 50\d\d\b|\bRTX PRO\b", 12.0),
    (r"\bA(30|100|800)\b", 8.0),
    (r"\bRTX 30\d\d\b|\bRTX A\d+|\bA(2|10[GM]?|16|40)\b", 8.6),
    (r"\bOrin\b", 8.7),
    (r"\bV100|\bTITAN V\b", 7.0),
    (r"\bP(4|40|100)\b|\bTITAN X|\bGTX 10\d\d\b", 6.0),
)

# Bytes that a block of threads may ask for ("opt-in"), by compute capability, from the tables of
# NVIDIA's CUDA C++ programming guide.
SHARED_MEMORY = {
    6.0: 48 * 1024,
    7.0: 96 * 1024,
    7.5: 64 * 1024,
    8.0: 163 * 1024,
    8.6: 99 * 1024,
    8.7: 163 * 1024,
    8.9: 99 * 1024,
    9.0: 227 * 1024,
    10.0: 227 * 1024,
    10.3: 227 * 1024,
    11.0: 227 * 1024,
    12.0: 99 * 1024,
    12.1: 99 * 1024,
}

# Multiprocessors of the Hopper GPUs, the only ones whose number is asked for: the first pattern
# that is found in the name counts. H100 and H200 in SXM sockets, NVL and GH200 have 132.
MULTIPROCESSORS = ((r"\bH20\b", 78), (r"\bPCIe\b", 114), (r"", 132))


class Gpu(NamedTuple):
    """What a GPU offers a kernel.

    Attributes:
        capability: its compute capability, e.g. 9.0; 0 for one that is not NVIDIA's.
        shared_memory: bytes that a block of threads may ask for.
    """

    capability: float
    shared_memory: int


# A name that the table lacks is most likely newer than the table. Kernels for 10.3 ask for the most
# shared memory, and 99 KiB is the least that a GPU has on which Triton's kernels run.
UNKNOWN = Gpu(10.3, 99 * 1024)
NO_NVIDIA = Gpu(0.0, 0)


def compiled_platform() -> str:
    """Its platform: "cpu", "gpu" or another.

    The abstract device of the current mesh where there is one, which a compile for another
    machine sets, else the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else None
    platform = platform or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def compiled_gpu() -> Gpu:
    """The GPU that is compiled for: read from the device, or from its name if it is not here."""
    kind, platform = _absent_kind()
    if kind is not None:
        return NO_NVIDIA if platform == "rocm" else gpu_of_kind(kind)
    here = jax.devices()[0]
    capability = str(getattr(here, "compute_capability", 0))
    if capability.startswith("gfx") or not float(capability):
        return NO_NVIDIA
    return gpu_of_device(float(capability), getattr(here, "shared_memory_per_block_optin", None))


def _absent_kind() -> tuple[str | None, str | None]:
    """Name and platform of the device that is compiled for where it is not the one here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.device_kind == jax.devices()[0].device_kind:
        return None, None
    return device.device_kind, device.platform


def gpu_of_device(capability: float, shared_memory: int | None) -> Gpu:
    """A GPU of this capability; without ``shared_memory`` it has what its capability says."""
    return Gpu(capability, shared_memory or SHARED_MEMORY.get(capability, UNKNOWN.shared_memory))


def gpu_of_kind(kind: str) -> Gpu:
    """A GPU that is not here, by its name, e.g. "NVIDIA A100-SXM4-40GB"; `UNKNOWN` without one."""
    if re.search(r"\bAMD\b|\bInstinct\b|\bRadeon\b|\bMI\d{3}|\bgfx", kind):
        return NO_NVIDIA
    for pattern, capability in CAPABILITIES:
        if re.search(pattern, kind):
            return Gpu(capability, SHARED_MEMORY[capability])
    return UNKNOWN


def multiprocessors() -> int:
    """How many multiprocessors the GPU compiled for has; by its name if it is not here."""
    kind, _ = _absent_kind()
    here = jax.devices()[0]
    if kind is None and here.platform == "gpu":
        return here.core_count
    return next(count for pattern, count in MULTIPROCESSORS if re.search(pattern, kind or ""))


def half_precision_dtype() -> jnp.dtype:
    """The 16-bit floating-point type that the device compiled for has units for.

    bfloat16; but float16 for NVIDIA GPUs before Ampere (T4, V100, RTX 20), which have none for
    bfloat16.

    Returns:
        ``bfloat16`` or ``float16``.
    """
    older = compiled_platform() == "gpu" and 0 < compiled_gpu().capability < 8
    return jnp.dtype(jnp.float16 if older else jnp.bfloat16)
