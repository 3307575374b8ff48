"""Which fused kernel computes a backward launch of "mosaic_gpu".

`short_windows` is for short windows, without sink tokens and for heads of 32 and 64, and under a
causal window for the shard's own keys alone; `fused` for heads of up to 128 in steps of 32;
`fused_wide_heads` for heads of 192 and 256. `fuses_backward` says where the last two are the
fastest kernels. Sinks that windows do not reach are left to `sinks`, which runs after the fused
kernel and finishes the gradients of queries.
"""

from functools import partial
from typing import Protocol

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels._kernels import BackwardInputs, Gradients
from pallas_kernels._mosaic_gpu.backward import fused, fused_wide_heads
from pallas_kernels._mosaic_gpu.backward import sinks as sinks_backward
from pallas_kernels._mosaic_gpu.backward.by_key_tiles import KeyTileKernel, by_key_tiles
from pallas_kernels._mosaic_gpu.backward.by_short_windows import by_short_windows
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqSums
from pallas_kernels._mosaic_gpu.backward.joined_runs import can_join
from pallas_kernels._mosaic_gpu.backward.short_windows_schedule import TILE, reaches
from pallas_kernels._spec import Spec


class FusedBackward(Protocol):
    """`Kernels.backward` by a fused kernel."""

    def __call__(
        self,
        spec: Spec,
        inputs: BackwardInputs,
        dquery: Float[Array, "B R0 N H"] | DqSums | None,
        *,
        rows: int,
        dquery_dtype: jnp.dtype | None,
        dkey_dtype: jnp.dtype,
        deterministic: bool,
    ) -> Gradients:
        """As `Kernels.backward`; `DqSums` are what it leaves where there is no ``dquery_dtype``.

        ``deterministic`` asks that the gradients of queries are added up in a fixed order.
        """
        ...


def fused_backward(spec: Spec, inputs: BackwardInputs) -> FusedBackward | None:
    """The fused kernel for this launch; None if there is none, or two kernels are faster."""
    window, runs = spec.window, inputs.runs
    dim, value_dim = inputs.query.shape[-1], runs[0].value.shape[-1]
    has_sinks_beyond_window = sinks_backward.has_sinks_beyond_window(spec, runs, inputs.sinks)
    widest = max(dim, value_dim)
    takes_heads = dim % 32 == 0 if widest <= 128 else fused_wide_heads.takes(dim, value_dim)
    if not takes_heads or (has_sinks_beyond_window and not sinks_backward.takes(spec)):
        return None
    if widest <= 64 and value_dim % 32 == 0 and _takes_short_windows(spec, inputs):
        return by_short_windows
    kernel: KeyTileKernel = fused if widest <= 128 else fused_wide_heads
    if not fuses_backward(widest, window) or not can_join(spec, runs, kernel.KEY_TILE):
        return None
    return partial(by_key_tiles, kernel)


def fuses_backward(dim: int, window: int | None) -> bool:
    """Whether `fused` or `fused_wide_heads` is faster than Triton's two kernels.

    Measured on an H100 80GB without documents. Heads of 64: faster at a window of 1023, slower at
    511. Heads of 96: faster at 255. Heads of 128: faster at 255, slower at 127. Heads of 192:
    faster at 127. Heads of 256: faster at 255.
    """
    shortest = 1023 if dim <= 64 else 192 if dim <= 128 else 127
    return window is None or window >= shortest


def _takes_short_windows(spec: Spec, inputs: BackwardInputs) -> bool:
    """Whether `short_windows` takes a launch; the halo of a causal window is left to others."""
    window, runs = spec.window, inputs.runs
    if inputs.out is None or window is None:
        return False
    if sinks_backward.has_sinks_beyond_window(spec, runs, inputs.sinks):
        return False
    if not spec.lookahead and (len(runs) > 1 or runs[0].offset):
        return False
    first = runs[0].offset - (runs[0].offset % TILE if len(runs) > 1 else 0)
    return reaches(window, first) and can_join(spec, runs, TILE)
