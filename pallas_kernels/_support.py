"""What a version of JAX and a device can run, and which inputs the GPU kernels take.

Each check raises NotImplementedError that names the implementation that was asked for.
"""

import functools
import importlib.util

import jax
from jax import Array
from jaxtyping import Float

from pallas_kernels._device import compiled_gpu, compiled_platform


def interprets(implementation: str | None) -> bool:
    """Whether an implementation runs in Pallas' interpreter here, which knows no check_vma."""
    return implementation == "triton" and compiled_platform() == "cpu"


@functools.cache
def has_triton() -> bool:
    """Whether this JAX comes with Pallas-Triton, which is deprecated and will leave it one day."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def check_triton(implementation: str) -> None:
    """Checks for Pallas-Triton and a device for it.

    Raises:
        NotImplementedError: one of them is missing.
    """
    if not has_triton():
        raise NotImplementedError(
            f"implementation={implementation!r} needs Pallas-Triton, which jax {jax.__version__} "
            "does not have"
        )
    platform = compiled_platform()
    if platform not in ("cpu", "gpu"):
        raise NotImplementedError(
            f"implementation={implementation!r} runs on GPUs, not on {platform!r}"
        )
    if platform == "gpu" and compiled_gpu().capability < 8:
        raise NotImplementedError(
            f"implementation={implementation!r} needs an NVIDIA GPU from Ampere on (compute "
            f"capability 8.0), this one has {compiled_gpu().capability}"
        )


def check_mosaic_gpu(implementation: str) -> None:
    """Checks for a Mosaic GPU backend of Pallas that the kernels know, and for a Hopper GPU.

    Raises:
        NotImplementedError: one of them is missing.
    """
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"implementation={implementation!r} needs the Mosaic GPU of jax 0.11 or newer, "
            f"this is jax {jax.__version__}"
        )
    platform = compiled_platform()
    if platform != "gpu":
        raise NotImplementedError(
            f"implementation={implementation!r} runs on Hopper GPUs, not on {platform!r}"
        )
    if compiled_gpu().capability != 9.0:
        raise NotImplementedError(
            f"implementation={implementation!r} needs a Hopper GPU (compute capability 9.0), "
            f"this one has {compiled_gpu().capability}"
        )


def check_dtype(
    implementation: str, query: Float[Array, "B T N H"], dtypes: tuple[str, ...]
) -> None:
    """Checks the dtype of queries, which is that of keys and values.

    Raises:
        NotImplementedError: it is none of ``dtypes``.
    """
    if query.dtype.name not in dtypes:
        names = f"{', '.join(dtypes[:-1])} or {dtypes[-1]}"
        raise NotImplementedError(
            f"implementation={implementation!r} takes {names}, got q of {query.dtype}"
        )


def check_head_dims(
    implementation: str, query: Float[Array, "B T N H"], value: Float[Array, "B T K Hv"]
) -> None:
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
