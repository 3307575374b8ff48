"""Says at import where JAX will not use a GPU because its plug-in is of another version."""

import warnings
from importlib import metadata

_EXTRAS = {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13"}


def mismatched_plugin() -> str | None:
    """What is wrong with an installed CUDA plug-in, and the command that mends it.

    JAX takes a plug-in only if its version is that of jaxlib. An upgrade of jax alone, as pip makes
    it on a Colab runtime, leaves the plug-in behind; JAX then goes on without the GPU.

    Returns:
        None where no plug-in is installed, or one fits.
    """
    versions = {name: _version(name) for name in _EXTRAS}
    jaxlib = _version("jaxlib")
    installed = {name: version for name, version in versions.items() if version is not None}
    if not installed or jaxlib is None or jaxlib in installed.values():
        return None
    name, version = next(iter(installed.items()))
    return (
        f"{name} {version} does not match jaxlib {jaxlib}, so JAX will not use the GPU: run "
        f'pip install "jax[{_EXTRAS[name]}]=={_version("jax")}" and restart Python'
    )


def warn_of_mismatch() -> None:
    """Warns once, in one line."""
    message = mismatched_plugin()
    if message is not None:
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


warn_of_mismatch()
