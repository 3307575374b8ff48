"""Uses the installed wheel; run it from a folder that holds no copy of the packages."""

import importlib.resources
import pathlib

import jax
import jax.numpy as jnp

import pallas_kernels
import ring_swa_jax

for package in (ring_swa_jax, pallas_kernels):
    folder = importlib.resources.files(package)
    assert "site-packages" in pathlib.Path(str(folder)).parts, f"not the wheel's: {folder}"
    assert folder.joinpath("py.typed").is_file(), f"no py.typed in {folder}"

q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
out = ring_swa_jax.ring_attention(q, k, v, window_size=7, num_sink_tokens=2, seq_axis=None)
expected = ring_swa_jax.reference_attention(q, k, v, window_size=7, num_sink_tokens=2)
error = float(jnp.abs(out - expected).max())
assert error < 1e-5, error
print(f"wheel: py.typed in both packages, ring_attention off the reference by {error:.1e}")
