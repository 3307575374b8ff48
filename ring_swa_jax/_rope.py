"""Rotary position embedding."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import accumulator_dtype
from ring_swa_jax import _checks
from ring_swa_jax._angles import angles
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._integers import as_positions
from ring_swa_jax._rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary settings of an attention layer; `apply_rope` says what they mean.

    Attributes:
        base: the wavelengths' base, theta.
        rotary_dim: even number of leading features to rotate; all by default.
        scaling: one of the classes ``*Scaling``, or None.
        interleaved: whether neighbouring features are paired, not the two halves.
    """

    base: float = 10000.0
    rotary_dim: int | None = None
    scaling: RopeScaling | None = None
    interleaved: bool = False

    def __post_init__(self):
        if isinstance(self.base, bool) or not isinstance(self.base, (int, float)):
            raise TypeError(f"base must be a Python number, got {self.base!r}")
        if not (self.base > 1 and math.isfinite(self.base)):
            raise ValueError(f"base must be finite and more than 1, got {self.base!r}")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim <= 0):
            raise ValueError(f"rotary_dim must be even and positive, got {self.rotary_dim!r}")
        _check_scaling(self.scaling)


def apply_rope(
    x: Float[AnyArray, "B S N H"],
    positions: Int[AnyArray, "#B S"] | Int[AnyArray, "S"],
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    scaling: RopeScaling | None = None,
    interleaved: bool = False,
) -> Float[Array, "B S N H"]:
    r"""Rotates queries or keys by their positions, so that ``q.k`` depends on distance alone.

    With R = rotary_dim, the pair :math:`(x_m, x_{m + R/2})` turns by the angle
    :math:`p \cdot \theta_m` at position p, for m in 0..R/2-1 (the two halves of the head are
    paired, as in Llama, Gemma and gpt-oss), with :math:`\theta_m = \mathrm{base}^{-2m / R}`
    unless a scaling changes it. The frequencies are float64 numbers; the angles are right to 1e-5
    at every position of an int32, and of a wider integer too.

    Args:
        x: queries or keys; computed in float32, or in float64 if that is their dtype.
        positions: of each token in its own sequence, e.g. from `segment_positions`, of any integer
            dtype; [S] does for all rows.
        base: the wavelengths' base, theta.
        rotary_dim: even number of leading features to rotate, all H by default.
        scaling: of the frequencies: `LinearScaling`, `YarnScaling`, `Llama3Scaling`,
            `LongRopeScaling` or `ProportionalScaling`.
        interleaved: pairs :math:`(x_{2m}, x_{2m + 1})` instead, as RoFormer and Command A do.

    Returns:
        The rotated array, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, a ``rotary_dim`` that is odd or larger than H, or
            NumPy's positions beyond int32 without ``jax_enable_x64``.
        TypeError: positions that are not numbers one can count with, x not floating-point, or a
            scaling of another type.

    References:
        Su et al., RoFormer, arXiv:2104.09864.
    """
    x, positions = _checks.as_array("x", x), as_positions(positions)
    if x.ndim != 4:
        raise ValueError(f"x must have the shape [B, S, N, H], got {x.shape}")
    _checks.check_dtype("x", x.dtype)
    if positions.shape not in (x.shape[:2], x.shape[1:2], (1, x.shape[1])):
        raise ValueError(
            f"positions must have the shape [B, S] or [S] of x {x.shape}, got {positions.shape}"
        )
    dim = x.shape[-1] if rotary_dim is None else rotary_dim
    if dim % 2 or not 0 < dim <= x.shape[-1]:
        raise ValueError(f"rotary_dim must be even and in 2..H={x.shape[-1]}, got {dim}")
    _check_scaling(scaling)
    dtype = accumulator_dtype(x.dtype)
    half = dim // 2
    frequencies = float(base) ** (-np.arange(half) / half)
    if scaling is not None:
        frequencies = scaling.frequencies(frequencies, base)
    positions = positions if positions.ndim == 2 else positions[None]
    turned_by = angles(positions, frequencies.tolist(), dtype)[:, :, None]
    cos, sin = jnp.cos(turned_by), jnp.sin(turned_by)
    if scaling is not None:
        cos, sin = cos * scaling.magnitude(), sin * scaling.magnitude()
    evens, odds = slice(0, dim, 2), slice(1, dim, 2)
    pair = (evens, odds) if interleaved else (slice(0, half), slice(half, dim))
    first, second = (x[..., part].astype(dtype) for part in pair)
    turned = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        turned = [jnp.stack(turned, axis=-1).reshape(*x.shape[:3], dim)]
    # An empty slice of an array on a mesh that is not set fails in jax 0.10.
    rest = [x[..., dim:].astype(dtype)] if dim < x.shape[-1] else []
    return jnp.concatenate([*turned, *rest], axis=-1).astype(x.dtype)


def _check_scaling(scaling) -> None:
    if scaling is not None and not isinstance(scaling, RopeScaling):
        raise TypeError(
            "scaling must be a LinearScaling, YarnScaling, Llama3Scaling, LongRopeScaling, "
            f"ProportionalScaling or None, got {scaling!r}"
        )
