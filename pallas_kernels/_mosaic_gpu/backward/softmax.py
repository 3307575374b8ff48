"""What the Mosaic GPU backward kernels share: softmax, its gradient, and writing results.

Logits here are keys by queries. With S the scaled products of a query with its keys, a weight is
``P = exp(S - lse)``, and the gradient of a logit ``dS = P * (dP - delta)``, where ``dP`` is the
product of the value and the gradient of the output, and ``delta = rowsum(out * dout)``. A query's
*shift* is what takes the place of ``-lse`` in base 2 (`shift_of`). Where that is possible,
accumulators begin with the shift and with ``-delta``, so that no instruction adds these.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Float32

from pallas_kernels._logits import LOG2_E, LOWEST, cap_logits
from pallas_kernels._mosaic_gpu.primitives import ROWS, zeros
from pallas_kernels._spec import Spec


def shift_of(spec: Spec, lse: Float32[Array, "B N T"]) -> Float32[Array, "B N T"]:
    """What is added to a query's logits, as `softmax_weights` expects it."""
    factor = -1 / spec.scale if _accumulates_shift(spec) else -LOG2_E
    return jnp.where(lse > -jnp.inf, lse * factor, LOWEST)


def padded_lse_and_delta(
    spec: Spec, lse: Float32[Array, "B N T"], delta: Float32[Array, "B N R"], length: int
) -> dict[str, Float32[Array, "B N {length}"]]:
    """The shift and ``-delta`` of queries, cut or padded to this length."""

    def padded(x, value):
        pad = ((0, 0), (0, 0), (0, max(0, length - x.shape[-1])))
        return jnp.pad(x[..., :length], pad, constant_values=value)

    return {"shift": padded(shift_of(spec, lse), LOWEST), "delta": padded(-delta, 0.0)}


def initial_logits(spec: Spec, shift: Float32[Array, "64 queries"]) -> Float32[Array, "64 queries"]:
    """What an accumulator of products of keys and queries begins with."""
    return shift if _accumulates_shift(spec) else zeros(shift.shape[1])


def softmax_backward(
    spec: Spec,
    logits: Any,
    dweights: Any,
    shift: Float32[Array, "64 queries"],
    unmasked: Bool[Array, ""] | None,
    mask: Callable[[Array], Array],
    dtype,
) -> tuple[Float[Array, "64 queries"], Float[Array, "64 queries"]]:
    """Weights, and the gradients of logits before the scale.

    Args:
        spec: static settings.
        logits: accumulator that began with `initial_logits`; its WGMMA was issued first.
        dweights: accumulator that began with ``-delta``; its WGMMA was issued last.
        shift: of the queries.
        unmasked: whether every query sees every key, so that ``mask`` is left out; None: always.
        mask: weights to weights that are zero where a query does not see a key.
        dtype: of the results.
    """
    # Waits for the logits, not yet for dweights.
    products = plgpu.wgmma_accumulator_load(logits, wait_n=1)
    weights, factors = softmax_weights(spec, products, shift, unmasked, mask)
    dlogits = factors * dweights[...]
    return weights.astype(dtype), dlogits.astype(dtype)


def softmax_weights(
    spec: Spec,
    products: Float32[Array, "64 queries"],
    shift: Float32[Array, "64 queries"],
    unmasked: Bool[Array, ""] | None,
    mask: Callable[[Array], Array],
) -> tuple[Float32[Array, "64 queries"], Float32[Array, "64 queries"]]:
    """Weights, and the factors that take dweights - delta to dlogits; as `softmax_backward`."""
    scaled, factor, dcap = cap_logits(spec, products)
    accumulated = _accumulates_shift(spec)
    weights = jnp.exp2(scaled * factor if accumulated else scaled * factor + shift)
    if unmasked is not None:
        weights = lax.cond(unmasked, lambda x: x, mask, weights)
    return weights, weights if dcap is None else weights * dcap


def staging_columns(dtype, *dims: int) -> int:
    """Columns of the buffer for `write_through_smem`, for results of so many columns."""
    columns = 64 // jnp.dtype(dtype).itemsize
    return 16 if any(dim % columns for dim in dims) else columns


def write_through_smem(
    result: Float32[Array, "64 columns"],
    staging: Any,
    dst: Callable[[int, int], Any],
    rows: int = ROWS,
) -> None:
    """Writes a matrix to global memory by TMA, some columns at a time.

    Args:
        result: the matrix.
        staging: buffer in SMEM for `ROWS` rows and some columns.
        dst: (first column, number of columns) to a ref in global memory.
        rows: how many of the first rows to write.
    """
    columns = staging.shape[1]
    for column in range(0, result.shape[1], columns):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = result[:, column : column + columns].astype(staging.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging.at[pl.ds(0, rows)], dst(column, columns))


def _accumulates_shift(spec: Spec) -> bool:
    """Whether accumulators of logits begin with the shift: scale and shift do not commute else."""
    return spec.soft_cap is None and spec.scale > 0
