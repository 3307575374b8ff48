"""Which fused kernel takes a backward launch of "mosaic_gpu", and what is around the kernel.

`short_windows` is for short windows of the shard's own keys, without sink tokens and for heads of
32 and 64; `fused` for heads of up to 128 in steps of 32, and `fused_wide_heads` for heads of 192
and 256, where `fuses_backward` says so. The launch that finishes the gradients of queries adds what
flows through sinks that windows do not reach (`sinks`).
"""

from functools import partial
from types import ModuleType
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels import _device, _logits
from pallas_kernels._kernels import BackwardInputs, Gradients, Queries
from pallas_kernels._mosaic_gpu.backward import (
    dq_postprocess,
    fused,
    fused_wide_heads,
    short_windows,
)
from pallas_kernels._mosaic_gpu.backward import sinks as sinks_backward
from pallas_kernels._mosaic_gpu.primitives import of_eighths
from pallas_kernels._spec import KeyRun, SinkRun, Spec


class FusedBackward(Protocol):
    """`Kernels.backward` by a fused kernel."""

    def __call__(
        self,
        spec: Spec,
        inputs: BackwardInputs,
        dquery: Float[Array, "B R N H"] | None,
        *,
        rows: int,
        dquery_dtype: jnp.dtype,
        dkey_dtype: jnp.dtype,
        deterministic: bool,
    ) -> Gradients:
        """Unless ``deterministic``, gradients of queries are added up in any order."""
        ...


def fused_backward(spec: Spec, inputs: BackwardInputs) -> FusedBackward | None:
    """The fused kernel for this launch; None if there is none, or two kernels are faster."""
    window, (*before, own) = spec.window, inputs.runs
    dim, value_dim = inputs.query.shape[-1], own.value.shape[-1]
    has_far_sinks = _has_far_sinks(spec, own, inputs.sinks)
    widest = max(dim, value_dim)
    fits = dim % 32 == 0 if widest <= 128 else fused_wide_heads.takes(dim, value_dim)
    if not fits or (has_far_sinks and not sinks_backward.takes(spec)):
        return None
    short = window is not None and window <= short_windows.LONGEST_WINDOW
    alone = not own.offset and not before
    if short and alone and not has_far_sinks and widest <= 64 and value_dim % 32 == 0:
        return _by_query_tiles
    kernel = fused if widest <= 128 else fused_wide_heads
    if not fuses_backward(widest, window) or not _can_join(spec, inputs.runs, kernel.KEYS):
        return None
    return partial(_by_key_tiles, kernel)


def fuses_backward(dim: int, window: int | None) -> bool:
    """Whether the fused Mosaic backward kernels are taken for faster ones, beside Triton's two.

    By windows where they won on an H100, without packing, and those where they lost: for heads of
    64 won at 1023 and lost at 511, of 96 won at 255, of 128 won at 255 and lost at 127, of 192 won
    at 127, of 256 at 255.
    """
    shortest = 1023 if dim <= 64 else 192 if dim <= 128 else 127
    return window is None or window >= shortest


def rounds_within_backward(window: int | None, packed: bool) -> bool:
    """Whether the fused Mosaic backward kernel rounds the gradients of queries it has added up.

    On an H100 that took 2 to 4% off the backward pass under a window, 8 to 18% off that of packed
    documents, and added 5% to it without a window.
    """
    return window is not None or packed


def _by_query_tiles(
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R N H"] | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
    deterministic: bool,
) -> Gradients:
    """The `FusedBackward` by `short_windows`, whose order of additions is fixed in any case."""
    del rows, deterministic
    dquery, *dkeys, delta = short_windows.backward(
        spec,
        inputs,
        dquery,
        dquery_dtype=dquery_dtype,
        dkey_dtype=dkey_dtype,
        processors=_device.multiprocessors(),
    )
    return Gradients(dquery, _by_runs(inputs.runs, dkeys), None, delta)


def _by_key_tiles(
    kernel: ModuleType,
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R N H"] | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
    deterministic: bool,
) -> Gradients:
    """The `FusedBackward` by ``kernel``: `fused` or `fused_wide_heads`."""
    query, runs, sinks, start, out, dout, lse = inputs
    own = runs[-1]
    delta = _logits.delta_of(out[:, :rows], dout[:, :rows], jnp.float32)
    queries = Queries(query, dout, lse, delta, start)
    launch = partial(
        kernel.backward,
        spec,
        queries,
        of_eighths(own) if len(runs) == 1 else _joined(runs, kernel.KEYS),
        rows=rows,
        processors=_device.multiprocessors(),
        ordered=deterministic,
    )
    if _has_far_sinks(spec, own, sinks):
        total, *gradients = launch(dkey_dtype=jnp.float32)
        *before, (dkey, dvalue) = _by_runs(runs, gradients)
        dquery, dkey, dvalue, dsinks = sinks_backward.backward(
            spec, queries, own, sinks, total, dquery, dkey, dvalue, dquery_dtype=dquery_dtype
        )
        rounded = tuple(
            (dkey.astype(dkey_dtype), dvalue.astype(dkey_dtype))
            for dkey, dvalue in (*before, (dkey, dvalue))
        )
        return Gradients(dquery, rounded, dsinks, delta)
    if (
        kernel is fused
        and deterministic
        and not own.offset
        and dquery is None
        and dquery_dtype == query.dtype
        and rounds_within_backward(spec.window, packed=start.ndim > 0)
    ):
        dquery, *gradients = launch(dkey_dtype=dkey_dtype, dquery_dtype=dquery_dtype)
    else:
        total, *gradients = launch(dkey_dtype=dkey_dtype)
        dquery = dq_postprocess.finish(
            total, dquery, scale=spec.scale, rows=rows, dtype=dquery_dtype
        )
    return Gradients(dquery, _by_runs(runs, gradients), None, delta)


def _has_far_sinks(spec: Spec, run: KeyRun, sinks: SinkRun | None) -> bool:
    """Whether queries may see sinks that their windows do not reach."""
    return spec.window is not None and (sinks is not None or spec.sinks_in(run.offset) > 0)


def _can_join(spec: Spec, runs: tuple[KeyRun, ...], key_tile: int) -> bool:
    """Whether several runs can be one: they end with the own keys, and no query sees a filling.

    Without a window two launches took 5% less time on an H100: in each the longest tasks can be
    first.
    """
    if len(runs) == 1:
        return True
    ends = [run.offset + run.key.shape[1] for run in runs]
    begins = [run.offset for run in runs]
    if spec.window is None or begins[-1] or ends[:-1] != begins[1:]:
        return False
    return begins[0] % key_tile == 0 or begins[0] + spec.window <= 0


def _joined(runs: tuple[KeyRun, ...], key_tile: int) -> KeyRun:
    """Runs that `_can_join` as one, filled up so that a tile of keys begins with the own ones."""
    filling = runs[0].offset % key_tile
    pad = ((0, 0), (filling, 0), (0, 0), (0, 0))
    key, value = (
        jnp.pad(jnp.concatenate(x, axis=1), pad)
        for x in zip(*((run.key, run.value) for run in runs), strict=True)
    )
    return KeyRun(key, value, runs[0].offset - filling)


def _by_runs(runs: tuple[KeyRun, ...], gradients) -> tuple[tuple[Array, Array], ...]:
    """Gradients of keys and values of all runs, run by run, without a filling before them."""
    # Without this barrier, adding a halo's gradients in place crashes the compiler of jax 0.11.2.
    gradients = lax.optimization_barrier(tuple(gradients))
    found, end = [], gradients[0].shape[1]
    for run in reversed(runs):
        begin = end - run.key.shape[1]
        found.append(tuple(x[:, begin:end] for x in gradients))
        end = begin
    return tuple(reversed(found))
