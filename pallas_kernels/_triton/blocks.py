"""What the Triton kernels share: loads and stores of tiles in parts, products and exponents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._logits import LOG2_E
from pallas_kernels._masks import is_real
from pallas_kernels._spec import Ends, Spec


def head_parts(dim: int) -> tuple[tuple[int, int], ...]:
    """(begin, size) of the powers of two that make up a head: Triton knows no other sizes."""
    parts, begin = [], 0
    while begin < dim:
        size = 1 << ((dim - begin).bit_length() - 1)
        parts.append((begin, size))
        begin += size
    return tuple(parts)


Rows = tuple[Any, ...]
"""Indexers of all axes but the last: a slice, with or without a head, or two equal arrays."""


def load_rows(ref: Any, rows: Rows, valid: Array | None = None) -> list[Array]:
    """Rows of a [rows, H] or [rows, heads, H] ref, in head parts: a list of [size, width].

    ``valid`` masks rows, which are then 0; None where all exist.
    """
    loaded = []
    for begin, width in head_parts(ref.shape[-1]):
        at = _columns(ref, rows, begin, width)
        if valid is None:
            loaded.append(plgpu.load(at))
        else:
            mask = jnp.broadcast_to(valid[:, None], (valid.size, width))
            loaded.append(plgpu.load(at, mask=mask, other=0.0))
    return loaded


def store_rows(ref: Any, rows: Rows, parts: list[Array], valid: Array | None = None) -> None:
    """The counterpart of ``load_rows``."""
    for (begin, width), x in zip(head_parts(ref.shape[-1]), parts, strict=True):
        mask = None if valid is None else jnp.broadcast_to(valid[:, None], x.shape)
        plgpu.store(_columns(ref, rows, begin, width), x.astype(ref.dtype), mask=mask)


def _columns(ref: Any, rows: Rows, begin: int, width: int) -> Any:
    """A reference to some columns of rows."""
    vectors = [x for x in rows if getattr(x, "ndim", 0)]
    if not vectors:
        # Under x64 Python's numbers are 64-bit, which interpret mode does not mix with the rows'.
        start = jnp.int32(begin) if jax.config.read("jax_enable_x64") else begin
        return ref.at[(*rows, pl.ds(start, width))]
    # Interpret mode takes slices or arrays, not both.
    shape = (vectors[0].size, width)
    columns = jnp.broadcast_to(begin + jnp.arange(width, dtype=jnp.int32), shape)
    index = [jnp.broadcast_to(x[:, None] if jnp.ndim(x) else x, shape) for x in rows]
    return ref.at[(*index, columns)]


def load_vector(ref: Any, index: Rows, valid: Array | None = None) -> Array:
    """Elements of a ref; 0 where not valid."""
    if valid is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=valid, other=0)


def bounds_operands(start: Array, end: Ends) -> dict[str, Array]:
    """Where the queries' sequences start, and end where that is given, as [B, T] or [1, 1]."""
    bounds = {"start": start} if end is None else {"start": start, "end": end}
    return {name: x if x.ndim else x.reshape(1, 1) for name, x in bounds.items()}


def bounds_blocks(operands: dict[str, Any]) -> dict[str, pl.BlockSpec]:
    """The blocks of `bounds_operands`."""
    return {name: batch_block(operands[name]) for name in ("start", "end") if name in operands}


def load_bounds(
    refs: dict[str, Any], positions: Array, valid: Array | None, *, packed: bool
) -> tuple[Array, Array | None]:
    """(start, end) of the sequences of queries at these positions; numbers unless ``packed``."""

    def load(ref):
        return load_vector(ref, (positions,), valid) if packed else ref[0]

    return load(refs["start"]), load(refs["end"]) if "end" in refs else None


def real_keys(
    refs: dict[str, Any], spec: Spec, offset: int, local: Array, exists: Array | None
) -> Array:
    """Which keys of a run at ``offset`` are no padding, by their indices in the run.

    A query sees keys before its shard only if its sequence crosses into the shard, and keys after
    it only if its sequence is the last one's.
    """
    if offset < spec.first_key:
        return offset + local >= refs["start"][0]
    if offset > spec.first_key:
        return offset + local < refs["end"][refs["end"].shape[0] - 1]
    start = load_vector(refs["start"], (local,), exists)
    end = load_vector(refs["end"], (local,), exists) if "end" in refs else None
    return is_real(local, start, end)


def dot(spec: Spec, x: Array, y: Array) -> Array:
    """A matrix product in float32, exact for float32 inputs unless the spec says otherwise."""
    precision = spec.precision if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=precision)


def inner(spec: Spec, xs: list[Array], ys: list[Array]) -> Array:
    """``x @ y.T`` over the head parts."""
    total = dot(spec, xs[0], ys[0].T)
    for x, y in zip(xs[1:], ys[1:], strict=True):
        total += dot(spec, x, y.T)
    return total


def exp2_scaled(logits: Array, factor: float, shift: Array, *, interpret: bool) -> Array:
    """``exp2(logits * factor - shift)``, ``shift`` broadcast over the logits.

    Two instructions an element: left to the compiler they are seven, for it neither fuses the
    product and the difference nor flushes what underflows.
    """
    if interpret:
        return jnp.exp2(logits * factor - shift)
    [weights] = plgpu.elementwise_inline_asm(
        "{ .reg .f32 x; fma.rn.f32 x, $1, $2, $3; ex2.approx.ftz.f32 $0, x; }",
        args=[logits, jnp.full_like(logits, factor), jnp.broadcast_to(-shift, logits.shape)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(logits.shape, jnp.float32)],
    )
    return weights


def log2_sums(lse: Array) -> Array:
    """Log-sum-exp in base 2, 0 for a query without keys."""
    return jnp.where(lse > -jnp.inf, lse * LOG2_E, 0.0)


def batch_block(x: Any) -> pl.BlockSpec:
    """All of [B, ...], or of [1, ...] that the whole batch shares, for grids that end in B."""
    shared = x.shape[0] == 1
    zeros = (0,) * (x.ndim - 1)
    return pl.BlockSpec((None, *x.shape[1:]), lambda t, n, b: (0 if shared else b, *zeros))


def div(x: Array, divisor: int) -> Array:
    """``x // divisor`` for ``x >= 0``; jnp's floor division has extra steps for negative ones."""
    return lax.div(x, np.int32(divisor))  # a Python number would be 64-bit under jax_enable_x64


def rem(x: Array, divisor: int) -> Array:
    """``x % divisor`` for ``x >= 0``, as `div`."""
    return lax.rem(x, np.int32(divisor))


def column(x: Array) -> Array:
    """[Q] as [Q, 1]; a scalar as it is."""
    return x[:, None] if x.ndim else x
