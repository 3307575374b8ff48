"""The yardstick of the ring: its busiest device's work on one GPU, nothing to wait for.

The keys around the chunk are already in this GPU's memory, in arrays of their own. One launch takes
them together with the chunk's, backward where the implementation is faster so. So what a ring loses
to the exchange, and to cutting its forward launches around it, both count against the ring.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import pallas_kernels
from benchmarks._ring_shapes import RingShape
from pallas_kernels import SinkRun, Spec
from pallas_kernels._implementations import kernels_of
from pallas_kernels._kernels import BackwardInputs, ForwardInputs
from pallas_kernels._spec import KeyRun
from ring_swa_jax._window import Window


def spec_of(shape: RingShape) -> Spec:
    """The settings of the kernels."""
    before, after = Window.of(shape.window_size).reach(shape.length)
    window = None if before is None else before + after
    return Spec(window, shape.sinks, shape.dim**-0.5, None, "highest", lookahead=after)


def programs(shape: RingShape, devices: int, implementation: str | None):
    """(forward, forward and backward) of `inputs`, without and with the cotangent.

    The gradients go to the queries, the keys and values as `inputs` has them, and the sinks. Keys
    that are not there stand for their own gradients.
    """
    spec, halo, chunk = spec_of(shape), shape.halo(devices), shape.chunk(devices)

    def launch(query, keys, sinks, start, end):
        kernels = kernels_of(pallas_kernels.choose(implementation, spec, query, keys[1][1]))
        places = (-halo, 0, chunk)
        runs = tuple(
            spec.moved_run(KeyRun(key, value, place))
            for (key, value), place in zip(keys, places, strict=True)
            if key.shape[1]
        )
        inputs = ForwardInputs(query, runs, sinks, None, *spec.moved(start, end))
        state = kernels.forward(
            spec, inputs, None, rows=(0, chunk), resume=False, out_dtype=query.dtype
        )
        return kernels, inputs, state

    def forward(*inputs):
        return launch(*inputs)[2].out

    def both(*inputs_and_dout):
        *arrays, dout = inputs_and_dout
        kernels, given, state = launch(*arrays)
        query, runs, sinks, _, start, end = given

        def backward(inputs, dquery, rows, dtype):
            return kernels.backward(
                spec, inputs, dquery, rows=rows, dquery_dtype=dtype, dkey_dtype=query.dtype
            )

        inputs = BackwardInputs(query, runs, sinks, start, state.out, dout, state.lse, end)
        if spec.lookahead or kernels.prefers_fused_halo_backward(spec, inputs):
            joined = backward(inputs, None, chunk, query.dtype)
            return state.out, (joined.dquery, like(arrays[1], joined.dkeys), joined.dsinks)
        halo_inputs = inputs._replace(runs=runs[:1], sinks=None)
        of_halo = backward(halo_inputs, None, halo, state.lse.dtype)
        of_own = backward(inputs._replace(runs=runs[1:]), of_halo.dquery, chunk, query.dtype)
        dkeys = like(arrays[1], (*of_halo.dkeys, *of_own.dkeys))
        return state.out, (of_own.dquery, dkeys, of_own.dsinks)

    return forward, both


def like(keys, dkeys):
    """The gradients of the runs of some length, in the form of all runs."""
    found = iter(jax.tree.leaves(dkeys))
    return jax.tree.map(lambda x: next(found) if x.shape[1] else x, keys)


def inputs(shape: RingShape, devices: int) -> Callable[..., tuple[Any, ...]]:
    """Function of the global (query, key, value, cu_seqlens, dout): what the device has of them."""
    rank, chunk, halo = shape.busiest(devices), shape.chunk(devices), shape.halo(devices)
    begin, end = rank * chunk, (rank + 1) * chunk
    behind = shape.halo_after(devices)
    starts = shape.starts()[begin:end] - begin
    first = begin + int(starts[0])
    if begin < halo:
        raise NotImplementedError(f"device {rank} has fewer keys before it than the last one")
    if shape.documents and shape.after != 0:
        raise NotImplementedError("packed documents under windows to both sides")

    def cut(query: Array, key: Array, value: Array, ends: Array | None, dout: Array):
        here = slice(begin, end)
        sinks = None
        if shape.sinks:
            rows = slice(first, first + shape.sinks)
            sinks = SinkRun(*(x[:, rows].astype(jnp.float32) for x in (key, value)))
        start = jnp.int32(-begin) if ends is None else jnp.asarray(starts, jnp.int32)[None]
        last = None if shape.after == 0 else jnp.int32(shape.length - begin)
        parts = (slice(begin - halo, begin), here, slice(end, end + behind))
        keys = tuple((key[:, part], value[:, part]) for part in parts)
        return query[:, here], keys, sinks, start, last, dout[:, here]

    return cut


def part(shape: RingShape, devices: int, result: Array) -> Array:
    """What of a global [B, S, N, H] array is the device's."""
    begin, chunk = shape.busiest(devices) * shape.chunk(devices), shape.chunk(devices)
    return jax.jit(lambda x: x[:, begin : begin + chunk])(result)
