"""Which fused kernel computes a backward launch of "mosaic_gpu", and what is done around it.

`short_windows` is for short windows, without sink tokens and for heads of 32 and 64, and under a
causal window for the shard's own keys alone; `fused` for heads of up to 128 in steps of 32;
`fused_wide_heads` for heads of 192 and 256. `fuses_backward` says where the last two are the
fastest kernels. Sinks that windows do not reach are left to `sinks`, which runs after the fused
kernel and finishes the gradients of queries.
"""

from functools import partial
from types import ModuleType
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels import _device
from pallas_kernels._kernels import BackwardInputs, Gradients, Queries
from pallas_kernels._mosaic_gpu.backward import (
    dq_postprocess,
    fused,
    fused_wide_heads,
    short_windows,
)
from pallas_kernels._mosaic_gpu.backward import sinks as sinks_backward
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqSums
from pallas_kernels._mosaic_gpu.backward.launch_schedule import backward_schedule
from pallas_kernels._mosaic_gpu.backward.short_windows_schedule import TILE, reaches
from pallas_kernels._mosaic_gpu.backward.tasks import BackwardSchedule
from pallas_kernels._mosaic_gpu.padding import with_zero_padding, zero_delta
from pallas_kernels._spec import KeyRun, SinkRun, Spec


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
    has_sinks_beyond_window = _has_sinks_beyond_window(spec, runs, inputs.sinks)
    widest = max(dim, value_dim)
    takes_heads = dim % 32 == 0 if widest <= 128 else fused_wide_heads.takes(dim, value_dim)
    if not takes_heads or (has_sinks_beyond_window and not sinks_backward.takes(spec)):
        return None
    if widest <= 64 and value_dim % 32 == 0 and _takes_short_windows(spec, inputs):
        return _by_short_windows
    kernel = fused if widest <= 128 else fused_wide_heads
    if not fuses_backward(widest, window) or not _can_join(spec, runs, kernel.KEY_TILE):
        return None
    return partial(_by_key_tiles, kernel)


def fuses_backward(dim: int, window: int | None) -> bool:
    """Whether `fused` or `fused_wide_heads` is faster than Triton's two kernels.

    Measured on an H100 80GB without documents. Heads of 64: faster at a window of 1023, slower at
    511. Heads of 96: faster at 255. Heads of 128: faster at 255, slower at 127. Heads of 192:
    faster at 127. Heads of 256: faster at 255.
    """
    shortest = 1023 if dim <= 64 else 192 if dim <= 128 else 127
    return window is None or window >= shortest


def rounds_within_backward(schedule: BackwardSchedule) -> bool:
    """Whether `fused` scales and rounds the gradients of queries itself (`DqEpilogue`).

    On an H100 80GB that took 2 to 4% off the backward pass under a window. Without a window it
    added 5% to it, and with 1, 8 and 23 documents 3, 10 and 6%: there the program of a document's
    first keys adds last for all of the document's queries, and waits for their sums at each step.
    So would the last program of a halo that comes last.
    """
    return schedule.window is not None and not schedule.packed and not schedule.halo_last


def _takes_short_windows(spec: Spec, inputs: BackwardInputs) -> bool:
    """Whether `short_windows` takes a launch; the halo of a causal window is left to others."""
    window, runs = spec.window, inputs.runs
    if inputs.out is None or window is None:
        return False
    if _has_sinks_beyond_window(spec, runs, inputs.sinks):
        return False
    if not spec.lookahead and (len(runs) > 1 or runs[0].offset):
        return False
    first = runs[0].offset - (runs[0].offset % TILE if len(runs) > 1 else 0)
    return reaches(window, first) and _can_join(spec, runs, TILE)


def _by_short_windows(
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R0 N H"] | DqSums | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype | None,
    dkey_dtype: jnp.dtype,
    deterministic: bool,
) -> Gradients:
    """The `FusedBackward` by `short_windows`, which is deterministic in any case."""
    del rows, deterministic
    assert not isinstance(dquery, DqSums)
    assert dquery_dtype is not None
    if inputs.end is not None and not inputs.end.ndim:
        inputs = _with_bounds_by_row(inputs)
    runs, start = inputs.runs, inputs.start
    if spec.lookahead and start.ndim:
        runs = with_zero_padding(spec, runs, start, ("key", "value"))
    run = _joined(runs, TILE) if len(runs) > 1 else runs[0]
    dquery, *dkeys, delta = short_windows.backward(
        spec,
        inputs._replace(runs=(run,)),
        dquery,
        dquery_dtype=dquery_dtype,
        dkey_dtype=dkey_dtype,
        num_sms=_device.multiprocessors(),
    )
    return Gradients(dquery, _split_by_runs(inputs.runs, TILE, dkeys), None, delta)


def _by_key_tiles(
    kernel: ModuleType,
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R0 N H"] | DqSums | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype | None,
    dkey_dtype: jnp.dtype,
    deterministic: bool,
) -> Gradients:
    """The `FusedBackward` by ``kernel``: `fused` or `fused_wide_heads`."""
    query, runs, sinks, start = inputs.query, inputs.runs, inputs.sinks, inputs.start
    dout, lse = inputs.dout, inputs.lse
    # Then each tile of queries has a program that adds last to its gradients.
    has_keys_beside_queries = runs[-1].offset + runs[-1].key.shape[1] > 0
    own = _own_run(spec, runs)
    if spec.lookahead and start.ndim:
        runs = with_zero_padding(spec, runs, start, ("key", "value"))
    delta = inputs.delta_of(rows)
    if start.ndim:
        delta = zero_delta(start, delta, spec.first_key)
    queries = Queries(query, dout, lse, delta, start, inputs.end)
    run = _joined(runs, kernel.KEY_TILE) if len(runs) > 1 else runs[0]
    num_sms = _device.multiprocessors()
    launch = partial(
        kernel.backward,
        spec,
        queries,
        run,
        rows=rows,
        num_sms=num_sms,
        deterministic=deterministic,
    )
    finish = partial(dq_postprocess.postprocess, scale=spec.scale, rows=rows)
    if isinstance(dquery, DqSums) or dquery_dtype is None:
        if dquery is None:
            columns = kernel.dquery_columns(query.shape[3])
            dquery = dq_postprocess.zero_sums(query, rows=rows, columns=columns)
        sums, *gradients = launch(dkey_dtype=dkey_dtype, sums=dquery)
        added = sums if dquery_dtype is None else finish(sums, None, dtype=dquery_dtype)
        return Gradients(added, _split_by_runs(runs, kernel.KEY_TILE, gradients), None, delta)
    if _has_sinks_beyond_window(spec, runs, sinks):
        sums, *gradients = launch(dkey_dtype=jnp.dtype(jnp.float32))
        dkeys = list(_split_by_runs(runs, kernel.KEY_TILE, gradients))
        n = len(runs) - 1 if own is None else own
        dquery, dkey, dvalue, dsinks = sinks_backward.backward(
            spec, queries, runs[n], sinks, sums, dquery, *dkeys[n], dquery_dtype=dquery_dtype
        )
        dkeys[n] = dkey, dvalue
        rounded = tuple(
            (dkey.astype(dkey_dtype), dvalue.astype(dkey_dtype)) for dkey, dvalue in dkeys
        )
        return Gradients(dquery, rounded, dsinks, delta)
    schedule = backward_schedule(
        spec, queries, run, rows=rows, key_tile=kernel.KEY_TILE, num_sms=num_sms
    )
    if (
        kernel is fused
        and deterministic
        and has_keys_beside_queries
        and dquery is None
        and dquery_dtype == query.dtype
        and rounds_within_backward(schedule)
    ):
        dquery, *gradients = launch(dkey_dtype=dkey_dtype, dquery_dtype=dquery_dtype)
    else:
        sums, *gradients = launch(dkey_dtype=dkey_dtype)
        dquery = finish(sums, dquery, dtype=dquery_dtype)
    return Gradients(dquery, _split_by_runs(runs, kernel.KEY_TILE, gradients), None, delta)


def _has_sinks_beyond_window(spec: Spec, runs: tuple[KeyRun, ...], sinks: SinkRun | None) -> bool:
    """Whether queries may see sinks that their windows do not reach."""
    own_sinks = any(spec.sinks_in(run.offset) > 0 for run in runs)
    return spec.window is not None and (sinks is not None or own_sinks)


def _with_bounds_by_row(inputs: BackwardInputs) -> BackwardInputs:
    """The same inputs with a start and an end for each query."""
    assert inputs.end is not None
    shape = inputs.query.shape[:2]
    start, end = (jnp.broadcast_to(x, shape) for x in (inputs.start, inputs.end))
    return inputs._replace(start=start, end=end)


def _own_run(spec: Spec, runs: tuple[KeyRun, ...]) -> int | None:
    """Which run has the shard's own keys."""
    offsets = [run.offset for run in runs]
    return offsets.index(spec.first_key) if spec.first_key in offsets else None


def _can_join(spec: Spec, runs: tuple[KeyRun, ...], key_tile: int) -> bool:
    """Whether one launch can take all runs: they are adjacent, and the own keys are among them.

    `_joined` pads the first tile of keys, so no query may see this padding. Without a window two
    launches are better, as each can have its longest tasks first: they took 5% less time on an H100
    80GB.
    """
    if len(runs) == 1:
        return True
    ends = [run.offset + run.key.shape[1] for run in runs]
    begins = [run.offset for run in runs]
    if spec.window is None or spec.first_key not in begins or ends[:-1] != begins[1:]:
        return False
    return begins[0] % key_tile == 0 or begins[0] + spec.window <= 0


def _joined(runs: tuple[KeyRun, ...], key_tile: int) -> KeyRun:
    """Adjacent runs as one, padded in front so that a tile of keys begins at position 0.

    Padding behind, which makes the length a multiple of 8 for TMA, is behind the last key of the
    sequence.
    """
    padding = runs[0].offset % key_tile
    length = padding + sum(run.key.shape[1] for run in runs)
    pad = ((0, 0), (padding, -length % 8), (0, 0), (0, 0))
    key, value = (
        jnp.pad(jnp.concatenate(x, axis=1), pad)
        for x in zip(*((run.key, run.value) for run in runs), strict=True)
    )
    return KeyRun(key, value, runs[0].offset - padding)


def _split_by_runs(
    runs: tuple[KeyRun, ...], key_tile: int, gradients: list[Array]
) -> tuple[tuple[Float[Array, "B _ K H"], Float[Array, "B _ K Hv"]], ...]:
    """(dkey, dvalue) of each run, without those of padding in front and behind."""
    # Without this barrier, adding a halo's gradients in place crashes the compiler of jax 0.11.2.
    dkey, dvalue = lax.optimization_barrier(tuple(gradients))
    length = sum(run.key.shape[1] for run in runs)
    begin_of_all = runs[0].offset % key_tile if len(runs) > 1 else dkey.shape[1] - length
    found, end = [], begin_of_all + length
    for run in reversed(runs):
        begin = end - run.key.shape[1]
        found.append((dkey[:, begin:end], dvalue[:, begin:end]))
        end = begin
    return tuple(reversed(found))
