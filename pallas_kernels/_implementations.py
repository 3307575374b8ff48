"""Which implementation computes a call, forward and backward chosen apart."""

import importlib
from types import ModuleType

from jax import Array

from pallas_kernels import _device, _support
from pallas_kernels._spec import Spec

NAMES = ("xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic")


_MODULES = {
    "xla": "pallas_kernels._xla",
    "triton": "pallas_kernels._triton.kernels",
    "mosaic_gpu": "pallas_kernels._mosaic_gpu.kernels",
    "mosaic_gpu_nondeterministic": "pallas_kernels._mosaic_gpu.nondeterministic",
}


_BEST_FIRST = {"gpu": ("mosaic_gpu", "triton", "xla")}


def choose(implementation: str | None, spec: Spec, query: Array, value: Array) -> str:
    """The name of the implementation to use for these inputs on the device compiled for.

    Raises:
        ValueError: no implementation has this name.
        NotImplementedError: the named one cannot compute this here; names the argument.
    """
    if implementation is not None:
        if implementation not in NAMES:
            raise ValueError(f"implementation={implementation!r} is none of {NAMES} or None")
        module(implementation).check(spec, query, value)
        return implementation
    for name in _BEST_FIRST.get(_device.compiled_platform(), ("xla",)):
        try:
            module(name).check(spec, query, value)
        except NotImplementedError:
            continue
        return name
    raise AssertionError("xla computes everything")


def module(name: str) -> ModuleType:
    """The module with the ``check``, ``forward``, ``joins`` and ``backward`` of an implementation.

    Imported when first used: Pallas-Triton is deprecated and may be missing.
    """
    if name == "triton":
        _support.check_triton()
    if name.startswith("mosaic_gpu"):
        _support.check_mosaic_gpu()
    return importlib.import_module(_MODULES[name])
