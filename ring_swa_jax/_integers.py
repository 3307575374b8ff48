"""Converts users' integer arrays of any width; none is truncated silently.

Without ``jax_enable_x64`` JAX silently drops the upper half of NumPy's 64-bit integers. So this
module checks NumPy arrays and lists before JAX sees them. A JAX array needs no such check.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from ring_swa_jax import _checks

_INT32 = np.iinfo(np.int32)


def as_segment_ids(ids, shape: tuple[int, ...] | None = None) -> Int[Array, "B S"]:
    """Segment ids as int32, or in a JAX array's wider dtype.

    NumPy ids beyond int32 are renumbered: they change, and are negative, at the same tokens.

    Raises:
        ValueError: another shape.
        TypeError: not integers.
    """
    ids = _as_array("segment_ids", ids)
    _checks.check_segment_ids(ids, shape)
    if isinstance(ids, np.ndarray) and not _fits_int32(ids):
        changes = np.zeros(ids.shape, bool)
        changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
        ids = np.where(ids < 0, -1, np.cumsum(changes, axis=1, dtype=np.int32))
    return _narrow(ids)


def as_cu_seqlens(cu_seqlens) -> Int[Array, "n"]:
    """Ends of sequences as int32; larger entries become 2**31 - 1, which is past every row.

    Raises:
        ValueError: not a vector of two or more.
        TypeError: not integers.
    """
    cu_seqlens = _as_array("cu_seqlens", cu_seqlens)
    _checks.check_cu_seqlens(cu_seqlens)
    return _clipped(cu_seqlens)


def as_counts(name: str, counts) -> Int[Array, "..."]:
    """Numbers of tokens as int32; larger ones become 2**31 - 1, more than any row has.

    Raises:
        TypeError: not integers.
    """
    counts = _as_array(name, counts)
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {counts.dtype}")
    return _clipped(counts)


def as_positions(positions) -> Int[Array, "..."]:
    """Positions as int32, or in a JAX array's wider dtype.

    Raises:
        ValueError: positions that JAX cannot hold without ``jax_enable_x64``.
        TypeError: not integers.
    """
    positions = _as_array("positions", positions)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions must be integers, got {positions.dtype}")
    if isinstance(positions, np.ndarray) and not _fits_int32(positions):
        if not jax.config.read("jax_enable_x64"):
            raise ValueError(
                f"positions from {positions.min()} to {positions.max()} do not fit into int32; "
                "set jax_enable_x64, or count from a nearer token: only distances matter"
            )
        return jnp.asarray(positions)
    return _narrow(positions)


def _as_array(name: str, x) -> Array | np.ndarray:
    if isinstance(x, (jax.Array, np.ndarray)):
        return x
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
        return jnp.asarray(x)  # a list of traced numbers
    try:
        return np.asarray(x)
    except ValueError as error:  # lists of different lengths
        raise TypeError(f"{name} must be an array, got {type(x).__name__}") from error


def _fits_int32(x: np.ndarray) -> bool:
    return x.size == 0 or (_INT32.min <= int(x.min()) and int(x.max()) <= _INT32.max)


def _clipped(x: Array | np.ndarray) -> Array:
    if jnp.iinfo(x.dtype).bits >= 32 and x.dtype != np.int32:
        clip = np.clip if isinstance(x, np.ndarray) else jnp.clip
        # Unsigned dtypes cannot represent a negative lower bound.
        x = clip(x, max(_INT32.min, int(jnp.iinfo(x.dtype).min)), _INT32.max)
    return jnp.asarray(x.astype(np.int32))


def _narrow(x: Array | np.ndarray) -> Array:
    """NumPy arrays, which the caller has checked, and narrower dtypes as int32."""
    if isinstance(x, np.ndarray) or jnp.iinfo(x.dtype).bits < 32:
        x = x.astype(np.int32)
    return jnp.asarray(x)
