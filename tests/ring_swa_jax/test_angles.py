"""Rotary angles against exact integer arithmetic, at positions as far as integers reach."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj

PI = fractions.Fraction(
    3141592653589793238462643383279502884197169399375105820974944592307816406286, 10**75
)
FAR = [0, 1, 2, 255, 256, 65535, 10**6, 2**20 + 1, 10**7, 2**24 - 1, 10**9 + 7, 2**30, 2**31 - 1]
SCALINGS = {
    "none": None,
    "linear": rsj.LinearScaling(8.0),
    "yarn": rsj.YarnScaling(32.0, 4096, attention_factor=1.0),
    "llama3": rsj.Llama3Scaling(),
}


def right(positions, base, dim, scaling):
    """cos and sin of the angles, which are reduced as fractions, of float64 frequencies."""
    frequencies = base ** (-np.arange(dim // 2) / (dim // 2))
    if scaling is not None:
        frequencies = scaling.frequencies(frequencies, base)
    turns = [
        [fractions.Fraction(theta) * p / (2 * PI) % 1 for theta in frequencies.tolist()]
        for p in positions
    ]
    angle = 2 * math.pi * np.array(turns, np.float64)
    return np.cos(angle), np.sin(angle)


def turned(positions, dim, dtype="float32", **options):
    """What apply_rope makes of (1, 0) in every pair: cos and sin of its angles."""
    x = jnp.zeros((1, len(positions), 1, dim), dtype).at[..., : dim // 2].set(1)
    y = np.asarray(rsj.apply_rope(x, positions[None], **options), np.float64)[0, :, 0]
    return y[:, : dim // 2], y[:, dim // 2 :]


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_far_positions(name, base):
    positions = np.array([*FAR, *(-p for p in FAR[1:])], np.int32)
    options = dict(base=base, scaling=SCALINGS[name])
    for got, want in zip(
        turned(positions, 64, **options), right(positions.tolist(), base, 64, SCALINGS[name]),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_small_angles_keep_their_relative_precision():
    _, sin = turned(np.array([1, 3], np.int32), 128, base=1e6)
    np.testing.assert_allclose(sin, right([1, 3], 1e6, 128, None)[1], rtol=1e-6)


def test_float64_and_positions_of_64_bits():
    with jax.enable_x64(True):
        positions = np.array([*FAR, -(2**31), 2**40 + 5, -(2**52), 2**62 + 9], np.int64)
        for dtype, atol in (("float64", 1e-14), ("float32", 1e-6)):
            got = turned(positions, 16, dtype)
            for x, y in zip(got, right(positions.tolist(), 1e4, 16, None), strict=True):
                np.testing.assert_allclose(x, y, atol=atol)


def test_decoding_far_from_the_beginning():
    """Products of queries and keys depend on the distance alone, wherever the row stands."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 20, 2, 32))
    near, far = jnp.arange(20)[None], 2**31 - 20 + jnp.arange(20)[None]

    def products(positions):
        q_turned, k_turned = rsj.apply_rope(q, positions), rsj.apply_rope(k, positions)
        return jnp.einsum("bihd,bjhd->bhij", q_turned, k_turned, precision="highest")

    np.testing.assert_allclose(products(far), products(near), atol=5e-5)
