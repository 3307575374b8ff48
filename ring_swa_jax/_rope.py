"""Rotary position embedding."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def apply_rope(
    x: Float[Array, "B S N H"],
    positions: Int[Array, "B S"],
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
) -> Float[Array, "B S N H"]:
    r"""Rotates queries or keys by their positions, so that ``q.k`` depends on distance alone.

    With R = rotary_dim, the pair :math:`(x_m, x_{m + R/2})` turns by the angle
    :math:`p \cdot \mathrm{base}^{-2m / R}` at position p, for m in 0..R/2-1 (the two halves of
    the head are paired, as in Llama, Gemma and gpt-oss).

    Args:
        x: queries or keys; computed in float32.
        positions: of each token in its own sequence, e.g. from `segment_positions`; [S] does for
            all rows.
        base: the wavelengths' base, theta.
        rotary_dim: even number of leading features to rotate, all H by default.

    Returns:
        The rotated array, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit, or a ``rotary_dim`` that is odd or larger than H.
        TypeError: positions that are not numbers one can count with, or x not floating-point.

    References:
        Su et al., RoFormer, arXiv:2104.09864.
    """
    if x.ndim != 4:
        raise ValueError(f"x must have the shape [B, S, N, H], got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating-point, got {x.dtype}")
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers, got {positions.dtype}")
    if positions.shape not in (x.shape[:2], x.shape[1:2], (1, x.shape[1])):
        raise ValueError(
            f"positions must have the shape [B, S] or [S] of x {x.shape}, got {positions.shape}"
        )
    dim = x.shape[-1] if rotary_dim is None else rotary_dim
    if dim % 2 or not 0 < dim <= x.shape[-1]:
        raise ValueError(f"rotary_dim must be even and in 2..H={x.shape[-1]}, got {dim}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    half = dim // 2
    frequencies = base ** (-jnp.arange(half, dtype=dtype) / half)
    angles = positions[..., None, None].astype(dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(dtype), x[..., half:dim].astype(dtype)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, x[..., dim:].astype(dtype)], axis=-1).astype(x.dtype)
