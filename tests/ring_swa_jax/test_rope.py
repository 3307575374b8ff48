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


def frequencies(dim, **settings):
    """What apply_rope turns pair m by in one step, and by how much it stretches."""
    x = jnp.zeros((1, 1, 1, dim)).at[..., : dim // 2].set(1)
    y = np.asarray(rsj.apply_rope(x, jnp.ones((1, 1), jnp.int32), **settings), np.float64)[0, 0, 0]
    turned = y[: dim // 2] + 1j * y[dim // 2 :]
    return np.angle(turned), np.abs(turned)


def yarn(dim, base, factor, length, beta_fast, beta_slow):
    """Section 3.2 of arXiv:2309.00071 with r the number of turns, but the ramp over the index m.

    The paper's ramp is linear in r; the authors' program and every model have it linear in m.
    """
    m = np.arange(dim // 2, dtype=np.float64)
    theta = base ** (-2 * m / dim)
    ends = [
        dim * np.log(length / (2 * np.pi * turns)) / (2 * np.log(base))
        for turns in (beta_fast, beta_slow)
    ]
    ramp = np.clip((m - ends[0]) / (ends[1] - ends[0]), 0, 1)
    return theta * (1 - ramp) + theta / factor * ramp


GPT_OSS = rsj.YarnScaling(32.0, 4096, truncate=False)


def test_yarn_of_gpt_oss():
    got, magnitude = frequencies(64, base=150000.0, scaling=GPT_OSS)
    np.testing.assert_allclose(got, yarn(64, 150000.0, 32.0, 4096, 32.0, 1.0), rtol=1e-4)
    np.testing.assert_allclose(magnitude, 0.1 * np.log(32) + 1, rtol=1e-5)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_the_fast_and_divides_the_slow(truncate):
    scaling = rsj.YarnScaling(8.0, 8192, truncate=truncate)
    plain, _ = frequencies(128, base=500000.0)
    got, _ = frequencies(128, base=500000.0, scaling=scaling)
    turns = plain * 8192 / (2 * np.pi)
    # Truncating moves the ends of the blend outwards by less than one index.
    margin = 500000.0 ** (2 / 128) if truncate else 1.0
    fast, slow = turns > 32 * margin, turns < 1 / margin
    np.testing.assert_allclose(got[fast], plain[fast], rtol=1e-5)
    np.testing.assert_allclose(got[slow], plain[slow] / 8, rtol=1e-5)
    between = ~fast & ~slow
    assert fast.sum() > 10 and slow.sum() > 10 and between.sum() > 10
    assert (np.diff(got / plain) < 1e-5).all()


def test_truncate_moves_the_ends_to_whole_indices():
    # By hand: with L = 8192 / (2 pi), 64 * log(L / 32) / log(5e5) = 18.08 and
    # 64 * log(L) / log(5e5) = 34.98.
    plain, _ = frequencies(128, base=500000.0)
    whole, _ = frequencies(128, base=500000.0, scaling=rsj.YarnScaling(8.0, 8192))
    divided = (1 - whole / plain) / (1 - 1 / 8)
    np.testing.assert_allclose(divided, np.clip((np.arange(64) - 18) / (35 - 18), 0, 1), atol=1e-4)


def test_attention_factor():
    scaling = rsj.YarnScaling(8.0, 8192, attention_factor=1.5)
    assert scaling.magnitude() == 1.5
    np.testing.assert_allclose(frequencies(64, scaling=scaling)[1], 1.5, rtol=1e-5)
    # OLMo 3 writes down what the default is.
    np.testing.assert_allclose(rsj.YarnScaling(8.0, 8192).magnitude(), 1.2079441541679836)


def test_factor_one_is_no_scaling():
    x, positions = random((1, 9, 2, 16)), jnp.arange(9)[None]
    plain = rsj.apply_rope(x, positions)
    for scaling in (rsj.LinearScaling(1.0), rsj.YarnScaling(1.0, 64), rsj.Llama3Scaling(1.0, 64)):
        got = rsj.apply_rope(x, positions, scaling=scaling)
        np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-5)


def test_linear_scaling_divides_the_positions():
    x, positions = random((1, 9, 2, 16)), jnp.arange(9)[None]
    got = rsj.apply_rope(x, 4 * positions, scaling=rsj.LinearScaling(4.0))
    np.testing.assert_allclose(got, rsj.apply_rope(x, positions), rtol=1e-5, atol=1e-5)


def test_llama3_scaling():
    base, length = 500000.0, 8192
    got, magnitude = frequencies(128, base=base, scaling=rsj.Llama3Scaling())
    # As Meta's program has it, in wavelengths.
    want = []
    for theta in base ** (-np.arange(64) / 64):
        wavelength = 2 * np.pi / theta
        if wavelength < length / 4:
            want.append(theta)
        elif wavelength > length / 1:
            want.append(theta / 8)
        else:
            smooth = (length / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * theta / 8 + smooth * theta)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    np.testing.assert_allclose(magnitude, 1, rtol=1e-5)


def test_interleaved_is_a_permutation_of_the_features():
    x, positions = random((1, 5, 2, 16)), jnp.arange(5)[None]
    halves = jnp.concatenate([x[..., 0:12:2], x[..., 1:12:2], x[..., 12:]], -1)
    y = rsj.apply_rope(halves, positions, rotary_dim=12)
    got = rsj.apply_rope(x, positions, rotary_dim=12, interleaved=True)
    np.testing.assert_allclose(got[..., 0:12:2], y[..., :6], rtol=1e-6)
    np.testing.assert_allclose(got[..., 1:12:2], y[..., 6:12], rtol=1e-6)
    np.testing.assert_array_equal(got[..., 12:], x[..., 12:])


def test_partial_rotation_leaves_the_rest():
    x, positions = random((1, 5, 2, 24)), jnp.arange(5)[None]
    got = rsj.apply_rope(x, positions, rotary_dim=8, scaling=rsj.YarnScaling(4.0, 64))
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])
    first = rsj.apply_rope(x[..., :8], positions, scaling=rsj.YarnScaling(4.0, 64))
    np.testing.assert_array_equal(got[..., :8], first)


@pytest.mark.parametrize(
    ("make", "error", "shown"),
    [
        (lambda: rsj.LinearScaling(0.5), ValueError, "0.5"),
        (lambda: rsj.LinearScaling("8"), TypeError, "'8'"),
        (lambda: rsj.YarnScaling(float("nan"), 4096), ValueError, "nan"),
        (lambda: rsj.YarnScaling(8.0, 0), ValueError, "original_length"),
        (lambda: rsj.YarnScaling(8.0, 4096, beta_fast=1.0, beta_slow=2.0), ValueError, "beta_fast"),
        (lambda: rsj.YarnScaling(8.0, 4096, attention_factor=0.0), ValueError, "attention_factor"),
        (lambda: rsj.Llama3Scaling(low_freq_factor=4.0), ValueError, "high_freq_factor"),
        (lambda: rsj.Rope(base=-1.0), ValueError, "-1.0"),
        (lambda: rsj.Rope(base="10000"), TypeError, "'10000'"),
        (lambda: rsj.Rope(rotary_dim=7), ValueError, "7"),
        (lambda: rsj.Rope(scaling=8.0), TypeError, "8.0"),
    ],
)
def test_settings_that_do_not_fit(make, error, shown):
    with pytest.raises(error) as caught:
        make()
    assert shown in str(caught.value)


def test_a_scaling_of_another_type():
    with pytest.raises(TypeError, match="YarnScaling"):
        rsj.apply_rope(random((1, 2, 1, 8)), jnp.arange(2), scaling={"factor": 8})
