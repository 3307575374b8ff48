"""Implementation "triton": Pallas-Triton kernels, for NVIDIA GPUs from Ampere on.

On a CPU they run in Pallas' interpreter.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from pallas_kernels import _device
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts, State
from pallas_kernels._tiles import TritonPlan, sink_tile, triton_plan
from pallas_kernels._triton_backward import backward_keys, backward_query
from pallas_kernels._triton_forward import forward as _forward

SINK_SPLITS = 32
"""Programs that share the queries of a tile of fetched sinks, which see many."""


def check(spec: Spec, query: Array, value: Array) -> None:
    """Checks that the kernels can compute this here.

    Raises:
        NotImplementedError: they cannot; names the argument.
    """
    _device.check_triton()
    for name, dim in (("q and k", query.shape[-1]), ("v", value.shape[-1])):
        if dim % 16 or dim > 256:
            raise NotImplementedError(
                f"implementation='triton' takes head dims that are multiples of 16 up to 256, "
                f"got {dim} of {name}"
            )
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"implementation='triton' takes float32, bfloat16 or float16, got q of {query.dtype}"
        )
    if max(query.size, query.size // query.shape[-1] * value.shape[-1]) >= 2**31:
        raise NotImplementedError(
            f"implementation='triton' counts elements in 32 bits, got q of shape {query.shape}"
        )


def query_tile_rows(spec: Spec, query: Array, value: Array) -> int:
    """Launches begin at multiples of a query tile."""
    return _plan(spec, query, value).forward.query


def forward(
    spec: Spec,
    query: Array,
    runs: tuple[KeyRun, ...],
    sinks: SinkRun | None,
    sink_logits: Array | None,
    start: Starts,
    state: State | None,
    *,
    rows: tuple[int, int],
    resume: bool,
    out_dtype: jnp.dtype,
) -> State:
    """As ``pallas_kernels._xla.forward``."""
    return _forward(
        spec,
        query,
        runs,
        sinks,
        sink_logits,
        start,
        state,
        rows=rows,
        resume=resume,
        out_dtype=out_dtype,
        tiles=_plan(spec, query, runs[0].value).forward,
        interpret=_device.interprets("triton"),
    )


def backward(
    spec: Spec,
    query: Array,
    runs: tuple[KeyRun, ...],
    sinks: SinkRun | None,
    start: Starts,
    dout: Array,
    lse: Array,
    delta: Array,
    dquery: Array | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
) -> tuple[Array, tuple[tuple[Array, Array], ...], SinkRun | None]:
    """As ``pallas_kernels._xla.backward``."""
    plan = _plan(spec, query, runs[0].value)
    interpret = _device.interprets("triton")

    def keys_of(keys, offset, out_dtype, splits, launches):
        """Gradients of a run by launches of (tiles, (whether dkey, whether dvalue))."""
        return [
            gradient
            for tiles, wanted in launches
            for gradient in backward_keys(
                spec,
                query,
                keys,
                offset,
                start,
                dout,
                lse,
                delta,
                rows=rows,
                out_dtype=out_dtype,
                tiles=tiles,
                splits=splits,
                wanted=wanted,
                interpret=interpret,
            )
        ]

    if plan.dvalue is None:
        launches = [(plan.dkey, (True, True))]
    else:
        launches = [(plan.dkey, (True, False)), (plan.dvalue, (False, True))]
    dkeys = []
    for run in runs:
        dkey, dvalue = keys_of((run.key, run.value), run.offset, dkey_dtype, 1, launches)
        dkeys.append((dkey[0], dvalue[0]))
    dsinks = None
    if sinks is not None:
        tile = sink_tile(sinks.key.shape[1])
        launches = [(dataclasses.replace(tiles, key=tile), wanted) for tiles, wanted in launches]
        keys = (sinks.key.astype(query.dtype), sinks.value.astype(query.dtype))
        parts = keys_of(keys, None, jnp.float32, SINK_SPLITS, launches)
        dsinks = SinkRun(*(x.sum(0) for x in parts))
    dquery = backward_query(
        spec,
        query,
        runs,
        sinks,
        start,
        dout,
        lse,
        delta,
        dquery,
        rows=rows,
        out_dtype=dquery_dtype,
        tiles=plan.dquery,
        interpret=interpret,
    )
    return dquery, tuple(dkeys), dsinks


def _plan(spec: Spec, query: Array, value: Array) -> TritonPlan:
    plan = triton_plan(query.dtype, query.shape[-1], value.shape[-1], spec.window)
    return plan.fit(query.shape[1])
