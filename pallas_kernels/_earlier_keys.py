"""The differentiable attention of new tokens to a cache and to each other.

All keys are on this device. One launch takes them all, forward and backward.
"""

from functools import partial
from typing import Any

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

    Takes what `attend` takes, but instead of a halo the ``earlier`` keys and values, any number of
    them; the last ones are just before ``key`` and ``value``. The window ends with the query.
    ``sinks`` are those of the first query's sequence, if it began before ``key``. ``start`` is one
    number only where no earlier key is before it.
    """
    arrays = (earlier, query, key, value, sinks, sink_logits, start)
    return _forward(spec, implementation, *arrays)[0]


def _forward(
    spec: Spec, implementation: str, *arrays: Any
) -> tuple[Float[Array, "B T N Hv"], tuple]:
    earlier, query, key, value, sinks, sink_logits, start = arrays
    inputs = ForwardInputs(
        query, _runs(earlier, key, value), sinks, learned_sinks(sink_logits, query), start
    )
    kernels, rows = _implementations.kernels_of(implementation), (0, query.shape[1])
    state = launch_forward(spec, kernels, inputs, None, rows=rows, out_dtype=query.dtype)
    out, lse = (vary_as(query, x) for x in state)
    return out, (*arrays, out, lse)


def _backward(
    spec: Spec, implementation: str, residuals: tuple, dout: Float[Array, "B T N Hv"]
) -> tuple:
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
    dsink_logits = sink_logits_gradient(sink_logits, lse, found.delta)
    dearlier, dkeys = found.dkeys
    return dearlier, found.dquery, *dkeys, found.dsinks, dsink_logits, None


attend_after_keys.defvjp(_forward, _backward)


def _runs(
    earlier: KeyValue, key: Float[Array, "B T K H"], value: Float[Array, "B T K Hv"]
) -> tuple[KeyRun, KeyRun]:
    return KeyRun(*earlier, -earlier[0].shape[1]), KeyRun(key, value, 0)
