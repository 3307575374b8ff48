"""apply_rope: a rotation by position, relative in its products, in the dtype of its input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_norm_is_preserved_and_position_zero_is_the_identity():
    x = random((2, 7, 3, 16))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    y = rsj.apply_rope(x, positions)
    assert y.shape == x.shape
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(y[:, 0], x[:, 0], rtol=1e-6)
    assert np.abs(y[:, 1:] - x[:, 1:]).max() > 0.1


def test_products_depend_on_the_distance_only():
    q, k = random((1, 1, 1, 32)), random((1, 1, 1, 32), 1)

    def product(i, j):
        at = lambda x, p: rsj.apply_rope(x, jnp.full((1, 1), p))  # noqa: E731
        return float((at(q, i) * at(k, j)).sum())

    np.testing.assert_allclose(product(105, 100), product(5, 0), rtol=1e-4, atol=1e-4)
    assert abs(product(6, 0) - product(5, 0)) > 1e-3


def test_positions_restart_in_each_document():
    ids = jnp.array([[0, 0, 0, 4, 4, 4]])
    x = random((1, 3, 2, 8))
    y = rsj.apply_rope(jnp.concatenate([x, x], 1), rsj.segment_positions(ids))
    np.testing.assert_array_equal(y[:, :3], y[:, 3:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_kept_and_large_positions_are_exact(dtype):
    x = random((1, 1, 1, 64)).astype(dtype)
    y = rsj.apply_rope(x, jnp.full((1, 1), 16383))
    assert y.dtype == x.dtype
    # Angles in float64 for either pairing of the dimensions: (i, i + 32) or (2i, 2i + 1).
    angle = 16383 * 10000.0 ** (-np.arange(32) / 32)
    value = np.asarray(x.astype(jnp.float32), np.float64)[0, 0, 0]
    got = np.asarray(y.astype(jnp.float32), np.float64)[0, 0, 0]
    errors = []
    for a, b in [(np.arange(32), np.arange(32) + 32), (np.arange(0, 64, 2), np.arange(1, 64, 2))]:
        want = np.empty(64)
        want[a] = value[a] * np.cos(angle) - value[b] * np.sin(angle)
        want[b] = value[a] * np.sin(angle) + value[b] * np.cos(angle)
        errors.append(np.abs(got - want).max())
    assert min(errors) < {"float32": 5e-3, "bfloat16": 3e-2, "float16": 8e-3}[dtype]


def test_base_changes_the_angles():
    x, positions = random((1, 4, 1, 8)), jnp.arange(4)[None]
    slow = rsj.apply_rope(x, positions, base=1e6)
    assert np.abs(slow - rsj.apply_rope(x, positions)).max() > 1e-3
    np.testing.assert_array_equal(rsj.apply_rope(x, positions, base=10000.0),
                                  rsj.apply_rope(x, positions))  # fmt: skip


def test_gradient_is_the_inverse_rotation():
    x, positions = random((1, 5, 2, 16)), jnp.arange(5)[None]
    y, pull = jax.vjp(lambda x: rsj.apply_rope(x, positions), x)
    np.testing.assert_allclose(pull(y)[0], x, rtol=1e-4, atol=1e-5)
