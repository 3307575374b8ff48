"""Implementation "triton": Pallas-Triton kernels, for NVIDIA GPUs from Ampere on.

On a CPU they run in Pallas' interpreter.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from pallas_kernels import _support
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts, State
from pallas_kernels._support import check_head_dims
from pallas_kernels._triton.backward_dkv import QueryArrays, backward_keys
from pallas_kernels._triton.backward_dq import backward_query
from pallas_kernels._triton.backward_sinks import backward_fetched_sinks, backward_own_sinks
from pallas_kernels._triton.forward import forward as _forward
from pallas_kernels._triton.tiles import TritonPlan, sink_tile, triton_plan


def check(spec: Spec, query: Array, value: Array) -> None:
    """Checks that the kernels can compute this here.

    Raises:
        NotImplementedError: they cannot; names the argument.
    """
    _support.check_triton()
    check_head_dims("triton", query, value)
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"implementation='triton' takes float32, bfloat16 or float16, got q of {query.dtype}"
        )
    if max(query.size, query.size // query.shape[-1] * value.shape[-1]) >= 2**31:
        raise NotImplementedError(
            f"implementation='triton' counts elements in 32 bits, got q of shape {query.shape}"
        )


def query_tile_rows(spec: Spec, query: Array, run: KeyRun) -> int:
    """Launches begin at multiples of a query tile."""
    return _plan(spec, query, run).forward.query


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
        tiles=_plan(spec, query, runs[0]).forward,
        interpret=_support.interprets("triton"),
    )


def joins(spec: Spec, query: Array, runs: tuple[KeyRun, ...], sinks: SinkRun | None) -> bool:
    """Whether a halo and own keys go together: no, the halo's gradients travel under the others."""
    return False


def backward(
    spec: Spec,
    query: Array,
    runs: tuple[KeyRun, ...],
    sinks: SinkRun | None,
    start: Starts,
    out: Array,
    dout: Array,
    lse: Array,
    dquery: Array | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
) -> tuple[Array, tuple[tuple[Array, Array], ...], SinkRun | None, Array]:
    """As ``pallas_kernels._xla.backward``."""
    plan = _plan(spec, query, runs[0])
    interpret = _support.interprets("triton")
    dquery, delta = backward_query(
        spec,
        query,
        runs,
        sinks,
        start,
        out,
        dout,
        lse,
        dquery,
        rows=rows,
        out_dtype=dquery_dtype,
        tiles=plan.dquery,
        interpret=interpret,
    )
    queries = QueryArrays(query, dout, lse, delta, start)
    sink_tiles = dataclasses.replace(plan.dkey, key=sink_tile(spec.num_sinks))
    dsinks = None
    if sinks is not None:
        key_value = (sinks.key.astype(query.dtype), sinks.value.astype(query.dtype))
        parts = backward_fetched_sinks(
            spec, queries, key_value, rows=rows, tiles=sink_tiles, interpret=interpret
        )
        dsinks = SinkRun(*(x.sum(0) for x in parts))
    dkeys = []
    for run in runs:
        far = None
        if spec.sinks_in(run.offset):
            far = backward_own_sinks(
                spec, queries, run, rows=rows, tiles=sink_tiles, interpret=interpret
            )
        if plan.dvalue is None:
            launches = [(plan.dkey, (True, True))]
        else:
            launches = [(plan.dkey, (True, False)), (plan.dvalue, (False, True))]
        gradients = [
            gradient
            for tiles, wanted in launches
            for gradient in backward_keys(
                spec,
                queries,
                run,
                far,
                out_dtype=dkey_dtype,
                rows=rows,
                tiles=tiles,
                wanted=wanted,
                interpret=interpret,
            )
        ]
        dkeys.append((gradients[0], gradients[1]))
    return dquery, tuple(dkeys), dsinks, delta


def _plan(spec: Spec, query: Array, run: KeyRun) -> TritonPlan:
    heads, dim = query.shape[2:]
    group = heads // run.key.shape[2]
    plan = triton_plan(query.dtype, dim, run.value.shape[-1], spec.window, group)
    return plan.fit(query.shape[1])
