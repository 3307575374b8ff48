"""Which implementation computes a call, forward and backward chosen apart."""

from types import ModuleType

import jax

from pallas_kernels import _xla

NAMES = ("xla", "triton", "mosaic_gpu")
_MODULES: dict[str, ModuleType] = {"xla": _xla}


def compiled_platform() -> str:
    """The platform that the current trace is compiled for.

    That is the abstract device of the mesh where one is set, which a compile for another machine
    sets, else the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else None
    return platform or jax.default_backend()


def choose(implementation: str | None) -> str:
    """The name of the implementation to use.

    Raises:
        ValueError: no implementation has this name.
        NotImplementedError: it does not exist for this device or this version.
    """
    if implementation is None:
        return "xla"
    if implementation not in NAMES:
        raise ValueError(f"implementation={implementation!r} is none of {NAMES} or None")
    if implementation not in _MODULES:
        raise NotImplementedError(
            f"implementation={implementation!r} is not part of this version; "
            f"use one of {tuple(_MODULES)} or None"
        )
    return implementation


def module(name: str) -> ModuleType:
    """The module with the ``forward`` and ``backward`` of an implementation."""
    return _MODULES[name]
