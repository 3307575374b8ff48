"""The differentiable attention of the last tokens of longer sequences, whose earlier keys are here.

So it is with new tokens and a cache. One launch takes all keys, forward and backward.
"""

from functools import partial

import jax
from jax import Array
from jaxtyping import Float

from pallas_kernels import _implementations
from pallas_kernels._halo import KeyValue
from pallas_kernels._kernels import BackwardInputs, ForwardInputs
from pallas_kernels._launches import (
    launch_backward,
    launch_forward,
    learned_sinks,
    sink_logits_gradient,
)
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts
from pallas_kernels._varying import vary_as


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_after_keys(
    spec: Spec,
    implementation: str,
    earlier: KeyValue,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sinks: SinkRun | None,
    sink_logits: Float[Array, "N"] | None,
    start: Starts,
) -> Float[Array, "B T N Hv"]:
    """Attention of queries to the keys at their own positions and to those just before these.

    Args:
        spec: static settings, of a window that ends with the query.
        implementation: one of ``IMPLEMENTATIONS``, as `choose` returns it.
        earlier: any number of keys and values; the last ones are just before ``key`` and ``value``.
        query: queries.
        key: the keys at their positions; N is a multiple of K.
        value: the values.
        sinks: the first tokens of the sequence that the first query is in, where it is before it.
        sink_logits: learned sinks.
        start: where each query's sequence starts, relative to the first query. One number for all
            only where no earlier key is before it.
    """
    return _forward(spec, implementation, earlier, query, key, value, sinks, sink_logits, start)[0]


def _forward(spec, implementation, earlier, query, key, value, sinks, sink_logits, start):
    inputs = ForwardInputs(
        query, _runs(earlier, key, value), sinks, learned_sinks(sink_logits, query), start
    )
    kernels, rows = _implementations.kernels_of(implementation), (0, query.shape[1])
    state = launch_forward(spec, kernels, inputs, None, rows=rows, out_dtype=query.dtype)
    # Mosaic GPU's kernels know nothing of manual mesh axes.
    out, lse = (vary_as(query, x) for x in state)
    return out, (earlier, query, key, value, sinks, sink_logits, start, out, lse)


def _backward(spec, implementation, residuals, dout):
    earlier, query, key, value, sinks, sink_logits, start, out, lse = residuals
    inputs = BackwardInputs(query, _runs(earlier, key, value), sinks, start, out, dout, lse)
    found = launch_backward(
        spec,
        _implementations.kernels_of(implementation),
        inputs,
        None,
        rows=query.shape[1],
        dquery_dtype=query.dtype,
        dkey_dtype=key.dtype,
    )
    dsink_logits = None
    if sink_logits is not None:
        dsink_logits = sink_logits_gradient(sink_logits, lse, found.delta)
    dearlier, dkeys = found.dkeys
    return dearlier, found.dquery, *dkeys, found.dsinks, dsink_logits, None


attend_after_keys.defvjp(_forward, _backward)


def _runs(
    earlier: KeyValue, key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"]
) -> tuple[KeyRun, KeyRun]:
    return KeyRun(*earlier, -earlier[0].shape[1]), KeyRun(key, value, 0)
