"""The Triton kernels under ``jax_enable_x64`` in Pallas' interpreter, where numbers are 64-bit.

`tests/pallas_kernels/test_lowering.py` has them lowered for a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj
from tests.helpers.layers import quick

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="runs in the interpreter")


@pytest.mark.parametrize("dim", [32, pytest.param(80, marks=pytest.mark.slow)])
def test_gradients(dim):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 40, 2, dim)).astype(np.float32) for _ in range(3)]
    ids = np.arange(40)[None] // 15
    options = dict(window_size=9, num_sink_tokens=3, segment_ids=ids)

    def gradients(attend, *arrays):
        loss = lambda *x: (attend(*x[:3], sink_logits=x[3], **options) ** 2).sum()  # noqa: E731
        return quick(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays, jnp.ones(2, jnp.float32))

    with jax.enable_x64(True):
        attend = functools.partial(rsj.ring_attention, seq_axis=None, implementation="triton")
        got = gradients(attend, *arrays)
        right = gradients(rsj.reference_attention, *arrays)
    for x, y in zip(got, right, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=3e-5)
