"""A backward launch by the kernel `short_windows`: what is done with the arrays around it."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels import _device
from pallas_kernels._kernels import BackwardInputs, Gradients
from pallas_kernels._mosaic_gpu.backward import short_windows
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqSums
from pallas_kernels._mosaic_gpu.backward.joined_runs import joined, split_by_runs
from pallas_kernels._mosaic_gpu.backward.short_windows_schedule import TILE
from pallas_kernels._mosaic_gpu.padding import with_zero_padding
from pallas_kernels._spec import Spec


def by_short_windows(
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R0 N H"] | DqSums | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype | None,
    dkey_dtype: jnp.dtype,
    deterministic: bool,
) -> Gradients:
    """`FusedBackward` by `short_windows`, which is deterministic in any case, for all queries."""
    del rows, deterministic
    assert not isinstance(dquery, DqSums)
    assert dquery_dtype is not None
    if inputs.end is not None and not inputs.end.ndim:
        inputs = _with_bounds_by_row(inputs)
    runs, start = inputs.runs, inputs.start
    if spec.lookahead and start.ndim:
        runs = with_zero_padding(spec, runs, start, ("key", "value"))
    run = joined(runs, TILE) if len(runs) > 1 else runs[0]
    dquery, *dkeys, delta = short_windows.backward(
        spec,
        inputs._replace(runs=(run,)),
        dquery,
        dquery_dtype=dquery_dtype,
        dkey_dtype=dkey_dtype,
        num_sms=_device.multiprocessors(),
    )
    return Gradients(dquery, split_by_runs(inputs.runs, TILE, dkeys), None, delta)


def _with_bounds_by_row(inputs: BackwardInputs) -> BackwardInputs:
    """The same inputs with a start and an end for each query."""
    assert inputs.end is not None
    shape = inputs.query.shape[:2]
    start, end = (jnp.broadcast_to(x, shape) for x in (inputs.start, inputs.end))
    return inputs._replace(start=start, end=end)
