"""Which backend computes a call: the one that is asked for, or the best one for the device."""

import functools
import importlib
import warnings

import jax
from jax import Array
from jaxtyping import Float

from pallas_kernels import _device, _support
from pallas_kernels._kernels import Kernels
from pallas_kernels._spec import Spec

NAMES = ("xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic")
_OBJECTS = {
    "xla": ("pallas_kernels._xla.kernels", "KERNELS"),
    "triton": ("pallas_kernels._triton.kernels", "KERNELS"),
    "mosaic_gpu": ("pallas_kernels._mosaic_gpu.kernels", "KERNELS"),
    "mosaic_gpu_nondeterministic": (
        "pallas_kernels._mosaic_gpu.kernels",
        "KERNELS_NONDETERMINISTIC",
    ),
}
_BEST_FIRST = {"gpu": ("mosaic_gpu", "triton", "xla")}


def choose(
    implementation: str | None,
    spec: Spec,
    query: Float[Array, "B T N H"],
    value: Float[Array, "B T K Hv"],
) -> str:
    """The name of the implementation to use for these inputs on the device compiled for.

    Raises:
        ValueError: no implementation has this name.
        NotImplementedError: the named one cannot compute this here; names the argument.
    """
    if implementation is not None:
        if implementation not in NAMES:
            raise ValueError(f"implementation={implementation!r} is none of {NAMES} or None")
        kernels_of(implementation).check(spec, query, value)
        return implementation
    for name in _BEST_FIRST.get(_device.compiled_platform(), ("xla",)):
        try:
            kernels_of(name).check(spec, query, value)
        except NotImplementedError:
            continue
        return name
    raise AssertionError("xla computes everything")


def overlaps_messages(name: str) -> bool:
    """Whether messages between devices may travel while launches of this implementation run.

    Not beside plain JAX. There more launches and messages only make a program longer to compile.
    """
    return not is_plain_jax(kernels_of(name))


def is_plain_jax(kernels: Kernels) -> bool:
    """Whether a backend has no kernels of its own."""
    return kernels is kernels_of("xla")


def kernels_of(name: str) -> Kernels:
    """The backend of this name.

    Imported on first use, because a JAX may lack what the module imports.

    Raises:
        NotImplementedError: this JAX or the device compiled for does not have what it needs.
    """
    if name == "triton":
        _support.check_triton(name)
    if name.startswith("mosaic_gpu"):
        _support.check_mosaic_gpu(name)
    kernels = _imported(name)
    if isinstance(kernels, NotImplementedError):
        raise kernels
    return kernels


@functools.cache
def _imported(name: str) -> Kernels | NotImplementedError:
    """The backend, or why this JAX cannot import it, which is warned of once.

    Pallas is experimental: a new JAX may have moved a name that a backend imports. Only that
    counts as unavailable; any other error is a fault of ours and is raised.
    """
    module, attribute = _OBJECTS[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if not is_about_jax(error):
            raise
        reason = f"implementation={name!r} is not available with jax {jax.__version__}: {error}"
        warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return NotImplementedError(reason)


def is_about_jax(error: ImportError | AttributeError) -> bool:
    """Whether what is missing is a module of jax or jaxlib, or a name in one of their modules."""
    if isinstance(error, ImportError):
        owner = error.name
    else:
        owner = getattr(error.obj, "__name__", None)
        if isinstance(error.obj, type):
            owner = error.obj.__module__
    return owner is not None and owner.partition(".")[0] in ("jax", "jaxlib")
