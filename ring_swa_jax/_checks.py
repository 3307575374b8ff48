"""Checks of shapes, dtypes and settings, made while tracing and shared by all entry points."""

import math
import operator

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def as_array(name: str, x) -> Array:
    """``x`` as a JAX array; lists and NumPy arrays are converted.

    Raises:
        TypeError: it is no array.
    """
    if isinstance(x, jax.Array):
        return x
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {type(x).__name__}") from error


def check_heads(
    query: Shaped[Array, "..."],
    key: Shaped[Array, "..."],
    value: Shaped[Array, "..."],
    *,
    batched: bool = True,
) -> None:
    """Checks that query, key and value fit together.

    Raises:
        ValueError: wrong ranks or sizes.
        TypeError: not one floating-point dtype.
    """
    letters = "[B, T, N, H]" if batched else "[T, N, H]"
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    swap = (
        f"dimensions are {letters}: arrays with the heads before the length go through "
        "jnp.swapaxes(x, -3, -2)"
    )
    rank = 4 if batched else 3
    if not query.ndim == key.ndim == value.ndim == rank:
        mend = (
            "one row without a batch goes in as x[None]"
            if batched
            else "rows of a batch go through ring_attention with segment_ids"
        )
        raise ValueError(
            f"query, key and value must have the shape {letters}, got {shapes}; {mend}"
        )
    if query.shape[:-2] != key.shape[:-2] or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "query, key and value must have the same batch and length, and key and value the "
            f"same heads, got {shapes}; {swap}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same head dim, got {shapes}")
    sizes = (*query.shape[-3:], *value.shape[-3:])  # the batch may be empty
    if 0 in sizes:
        raise ValueError(f"query, key and value must have tokens, heads and features, got {shapes}")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"the {query.shape[-2]} query heads must be a multiple of the {key.shape[-2]} "
            f"key/value heads, got {shapes}; {swap}"
        )
    dtypes = f"query {query.dtype}, key {key.dtype}, value {value.dtype}"
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must share one dtype, got {dtypes}; cast them first")
    check_dtype("query, key and value", query.dtype)


def check_dtype(names: str, dtype) -> None:
    """Checks that attention is computed in this dtype.

    Raises:
        TypeError: it is not.
    """
    if jnp.dtype(dtype).name not in _FLOATS:
        raise TypeError(
            f"{names} must be float16, bfloat16, float32 or float64, got {dtype}; cast first"
        )


def static_sinks(num_sink_tokens) -> int:
    """``num_sink_tokens`` as a non-negative Python int.

    Raises:
        TypeError: not a static integer.
        ValueError: negative.
    """
    return static_count("num_sink_tokens", num_sink_tokens)


def static_size(name: str, value) -> int:
    """A size as a Python int of at least 1.

    Raises:
        TypeError: not a static integer.
        ValueError: less than 1.
    """
    size = static_count(name, value)
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def static_count(name: str, value, mend_of_negative: str = "") -> int:
    """A non-negative Python int.

    Raises:
        TypeError: not a static integer.
        ValueError: negative.
    """
    try:
        count = operator.index(value)
    except TypeError:  # JAX's errors for traced values are TypeErrors too
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(
            f"{name} must be a static Python int, got {value!r}{_mend_of_traced(value)}"
        )
    if count < 0:
        raise ValueError(f"{name} must not be negative, got {count}{mend_of_negative}")
    return count


def _mend_of_traced(value) -> str:
    if not isinstance(value, jax.core.Tracer):
        return ""
    return "; under jit, close over it or name it in static_argnames"


def static_scale(scale, head_dim: int) -> float:
    """The factor of the logits, ``head_dim ** -0.5`` by default.

    Raises:
        TypeError: not a static number.
        ValueError: not finite.
    """
    if scale is None:
        return head_dim**-0.5
    factor = _static_float("scale", scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale must be finite, or None for H**-0.5; got {scale!r}")
    return factor


def static_soft_cap(cap) -> float | None:
    """The bound of the logits, None for no bound.

    Raises:
        TypeError: not a static number.
        ValueError: not positive or not finite.
    """
    if cap is None:
        return None
    bound = _static_float("logits_soft_cap", cap)
    if not (bound > 0 and math.isfinite(bound)):
        raise ValueError(f"logits_soft_cap must be positive and finite, or None; got {cap!r}")
    return bound


def _static_float(name: str, value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be a static Python number, got {value!r}{_mend_of_traced(value)}"
        ) from error


def check_sink_logits(sink_logits: Shaped[Array, "..."] | None, num_heads: int) -> None:
    """Checks one floating-point logit a query head.

    Raises:
        ValueError: another shape.
        TypeError: another dtype.
    """
    if sink_logits is None:
        return
    if sink_logits.shape != (num_heads,):
        raise ValueError(
            f"sink_logits must have one number a query head, shape ({num_heads},), "
            f"got {sink_logits.shape}"
        )
    if not jnp.issubdtype(sink_logits.dtype, jnp.floating):
        raise TypeError(f"sink_logits must be floating-point, got {sink_logits.dtype}")


def check_sinks_fit(num_sinks: int, chunk: int, devices: int) -> None:
    """Checks that a sequence's sinks lie on at most two devices.

    Raises:
        ValueError: more sinks than a chunk holds, on more than one device.
    """
    if devices > 1 and num_sinks > chunk:
        raise ValueError(
            f"num_sink_tokens={num_sinks} is longer than the chunk of {chunk} tokens that each of "
            f"the {devices} devices holds; use fewer sinks, fewer devices, a longer "
            "sequence or exchange='all_to_all'"
        )


def check_cu_seqlens(cu_seqlens) -> None:
    """Checks the type and rank of cumulative sequence lengths; their values stay unread.

    Raises:
        ValueError: not a vector of two or more.
        TypeError: not integers.
    """
    if not jnp.issubdtype(cu_seqlens.dtype, jnp.integer):
        raise TypeError(f"cu_seqlens must be integers, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.size < 2:
        raise ValueError(
            "cu_seqlens must be a vector [0, end of sequence 1, ..., end of the last sequence], "
            f"got shape {cu_seqlens.shape}"
        )


def check_segment_ids(segment_ids, shape: tuple[int, ...] | None = None) -> None:
    """Checks that segment ids, a JAX or NumPy array, are integers of the shape [B, S].

    Raises:
        ValueError: another shape.
        TypeError: not integers.
    """
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        is_mask = segment_ids.dtype == bool
        mend = "; of a mask of the real tokens write jnp.where(mask, 0, -1)" if is_mask else ""
        raise TypeError(f"segment_ids must be integers, got {segment_ids.dtype}{mend}")
    if segment_ids.ndim != 2 or (shape is not None and segment_ids.shape != shape):
        wanted = "[B, S]" if shape is None else f"[B, S] = {shape}"
        mend = ""
        if segment_ids.ndim == 1:
            rows = (
                "segment_ids[None]" if shape is None else f"jnp.broadcast_to(segment_ids, {shape})"
            )
            mend = f"; if they are those of every row, write {rows}"
        raise ValueError(f"segment_ids must have the shape {wanted}, got {segment_ids.shape}{mend}")


def check_valid(valid: Shaped[Array, "..."], shape: tuple[int, ...]) -> None:
    """Checks that ``valid`` is a boolean mask of this shape.

    Raises:
        ValueError: another shape.
        TypeError: not booleans.
    """
    if valid.dtype != bool:
        raise TypeError(f"valid must be boolean, got {valid.dtype}")
    if valid.shape != shape:
        raise ValueError(f"valid must have the shape {shape}, got {valid.shape}")
