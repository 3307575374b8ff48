"""Uses the installed wheel and compares its files with those of the repository.

Run it from a folder that holds no copy of the packages.
"""

import importlib.resources
import pathlib

import jax
import jax.numpy as jnp

import pallas_kernels
import ring_swa_jax

REPOSITORY = pathlib.Path(__file__).parent.parent


def files(folder: pathlib.Path) -> set[str]:
    """Modules, in all sub-packages, and the marker of types."""
    found = [*folder.rglob("*.py"), *folder.rglob("py.typed")]
    return {path.relative_to(folder).as_posix() for path in found}


for package in (ring_swa_jax, pallas_kernels):
    folder = pathlib.Path(str(importlib.resources.files(package)))
    assert "site-packages" in folder.parts, f"not the wheel's: {folder}"
    missing = files(REPOSITORY / package.__name__) - files(folder)
    assert not missing, f"the wheel's {package.__name__} lacks {sorted(missing)}"
    assert "py.typed" in files(folder), f"no py.typed in {folder}"

q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
out = ring_swa_jax.ring_attention(q, k, v, window_size=7, num_sink_tokens=2, seq_axis=None)
expected = ring_swa_jax.reference_attention(q, k, v, window_size=7, num_sink_tokens=2)
error = float(jnp.abs(out - expected).max())
assert error < 1e-5, error
print(f"wheel: all modules, py.typed; ring_attention off the reference by {error:.1e}")
