"""What the Triton kernels share: loads and stores of tiles in parts, products and logits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._spec import Spec

LOG2_E = 1.4426950408889634
LOWEST = -1e30
"""Stands for -inf where a difference of two must be a number."""


def head_parts(dim: int) -> tuple[tuple[int, int], ...]:
    """(begin, size) of the powers of two that make up a head: Triton knows no other sizes."""
    parts, begin = [], 0
    while begin < dim:
        size = 1 << ((dim - begin).bit_length() - 1)
        parts.append((begin, size))
        begin += size
    return tuple(parts)


def load_rows(ref: Any, begin, size: int, valid=None, *, head=None) -> list[Array]:
    """Rows ``begin..begin+size-1`` of a [rows, H] or [rows, heads, H] ref, in head parts.

    ``valid`` masks rows, which are then 0; None where all exist.
    """
    rows = pl.ds(begin, size)
    loaded = []
    for part, width in head_parts(ref.shape[-1]):
        index = (rows, pl.ds(part, width)) if head is None else (rows, head, pl.ds(part, width))
        if valid is None:
            loaded.append(plgpu.load(ref.at[index]))
        else:
            mask = jnp.broadcast_to(valid[:, None], (size, width))
            loaded.append(plgpu.load(ref.at[index], mask=mask, other=0.0))
    return loaded


def store_rows(ref: Any, begin, parts: list[Array], valid=None) -> None:
    """The counterpart of ``load_rows``."""
    for (part, width), x in zip(head_parts(ref.shape[-1]), parts, strict=True):
        mask = None if valid is None else jnp.broadcast_to(valid[:, None], x.shape)
        at = ref.at[pl.ds(begin, x.shape[0]), pl.ds(part, width)]
        plgpu.store(at, x.astype(ref.dtype), mask=mask)


def load_vector(ref: Any, begin, size: int, valid=None, *, head=None) -> Array:
    """Elements ``begin..begin+size-1`` of a [rows] or [heads, rows] ref; 0 where not valid."""
    index = pl.ds(begin, size) if head is None else (head, pl.ds(begin, size))
    if valid is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=valid, other=0)


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


def cap_logits(spec: Spec, products: Array) -> tuple[Array, float, Array | None]:
    """Logits, the positive factor that takes them to base 2, and the derivative of the cap."""
    if spec.soft_cap is not None:
        bounded = jnp.tanh(products * (spec.scale / spec.soft_cap))
        return bounded, spec.soft_cap * LOG2_E, 1 - bounded * bounded
    if spec.scale > 0:
        return products, spec.scale * LOG2_E, None
    return products * spec.scale, LOG2_E, None


def exp2_scaled(logits: Array, factor: float, top: Array, *, interpret: bool) -> Array:
    """``exp2(logits * factor - top)`` with top broadcast over the logits.

    Two instructions an element: left to the compiler they are seven, for it neither fuses the
    product with the difference nor flushes what underflows.
    """
    if interpret:
        return jnp.exp2(logits * factor - top)
    [weights] = plgpu.elementwise_inline_asm(
        "{ .reg .f32 x; fma.rn.f32 x, $1, $2, $3; ex2.approx.ftz.f32 $0, x; }",
        args=[logits, jnp.full_like(logits, factor), jnp.broadcast_to(-top, logits.shape)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(logits.shape, jnp.float32)],
    )
    return weights


def batch_block(x: Any) -> pl.BlockSpec:
    """All of [B, ...], or of [1, ...] that the whole batch shares, for grids that end in B."""
    shared = x.shape[0] == 1
    zeros = (0,) * (x.ndim - 1)
    return pl.BlockSpec((None, *x.shape[1:]), lambda t, n, b: (0 if shared else b, *zeros))


def column(x: Array) -> Array:
    """[Q] as [Q, 1]; a scalar as it is."""
    return x[:, None] if x.ndim else x
