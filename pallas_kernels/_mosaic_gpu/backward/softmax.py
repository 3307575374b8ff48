"""What the backward kernels in Mosaic GPU share: weights, their gradients, and writing results."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._logits import LOG2_E, LOWEST, cap_logits
from pallas_kernels._mosaic_gpu.primitives import ROWS, zeros
from pallas_kernels._spec import Spec


def shift_of(spec: Spec, lse: Array) -> Array:
    """What a query subtracts from its logits, as `weigh` takes it."""
    return jnp.where(lse > -jnp.inf, lse * (-1 / spec.scale if _first(spec) else -LOG2_E), LOWEST)


def of_queries(spec: Spec, lse: Array, delta: Array, length: int) -> dict[str, Array]:
    """The shift and ``-delta``, [B, N, at least rows] cut or filled up to this length."""

    def filled(x, value):
        pad = ((0, 0), (0, 0), (0, max(0, length - x.shape[-1])))
        return jnp.pad(x[..., :length], pad, constant_values=value)

    return {"shift": filled(shift_of(spec, lse), LOWEST), "delta": filled(-delta, 0.0)}


def sums_of_logits(spec: Spec, shift: Array) -> Array:
    """What the product of keys and queries is added to, keys by queries."""
    return shift if _first(spec) else zeros(shift.shape[1])


def weigh(
    spec: Spec,
    logits: Any,
    dweights: Any,
    shift: Array,
    clear: Array,
    mask: Callable[[Array], Array],
    dtype,
) -> tuple[Array, Array]:
    """Weights, and the gradients of logits, from accumulators whose products are under way.

    ``mask`` is left out where all is ``clear``.
    """
    products = plgpu.wgmma_accumulator_load(logits, wait_n=1)
    weights, factors = weights_of(spec, products, shift, clear, mask)
    dlogits = factors * dweights[...]
    return weights.astype(dtype), dlogits.astype(dtype)


def weights_of(
    spec: Spec, products: Array, shift: Array, clear: Array, mask: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Weights, and the factors of gradients of logits, of products of keys and queries.

    ``mask`` is left out where all is ``clear``.
    """
    scaled, factor, dcap = cap_logits(spec, products)
    weights = jnp.exp2(scaled * factor if _first(spec) else scaled * factor + shift)
    weights = lax.cond(clear, lambda x: x, mask, weights)
    return weights, weights if dcap is None else weights * dcap


def part_width(dtype, *dims: int) -> int:
    """Columns of the parts in which `write_parts` writes results of so many columns."""
    width = 64 // jnp.dtype(dtype).itemsize
    return 16 if any(dim % width for dim in dims) else width


def write_parts(result: Array, buffer: Any, there: Any, rows: int = ROWS) -> None:
    """Writes the first rows of a matrix, in parts for which there is shared memory."""
    width = buffer.shape[1]
    for column in range(0, result.shape[1], width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = result[:, column : column + width].astype(buffer.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, rows)], there(column, width))


def _first(spec: Spec) -> bool:
    """Whether the shift is added up with the products, rather than subtracted from them."""
    return spec.soft_cap is None and spec.scale > 0
