"""One launch, forward and backward, of any backend and under JAX's transformations."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels import _implementations
from pallas_kernels._derivatives import first_order
from pallas_kernels._kernels import BackwardInputs, ForwardInputs, Gradients, Kernels, PartialSums
from pallas_kernels._spec import Ends, KeyRun, Spec, Starts, State, accumulator_dtype

_Results = TypeVar("_Results", State, Gradients)


def attend_keys(
    spec: Spec,
    implementation: str,
    query: Float[Array, "B T N H"],
    run: KeyRun,
    sink_logits: Float[Array, "N"] | None,
    start: Starts,
    end: Ends,
    state: State | None,
    out_dtype: jnp.dtype,
) -> State:
    """One launch of the forward pass, for a schedule that the caller makes.

    Args:
        spec: static settings.
        implementation: one of ``IMPLEMENTATIONS``, as `choose` returns it.
        query: queries of the shard.
        run: keys that they attend, with the position of the first one relative to the shard.
        sink_logits: learned sinks; they enter the softmax in this launch, so give them to one.
        start: where each query's sequence starts, relative to the shard.
        end: where each query's sequence ends, likewise; None where ``run`` has no key after the
            query but those of its sequence.
        state: attention to the keys of earlier launches, or None.
        out_dtype: of the output; the accumulator's unless this is the only launch.

    Returns:
        Attention to the keys of this launch and of the earlier ones. After the last launch it must
        be cast to vary over manual mesh axes as the query does, and not before (see `vary_as`).
    """
    learned = learned_sinks(sink_logits, query)
    inputs = ForwardInputs(query, (spec.moved_run(run),), None, learned, *spec.moved(start, end))
    kernels, rows = _implementations.kernels_of(implementation), query.shape[1]
    resume = state is not None
    return launch_forward(
        spec, kernels, inputs, state, rows=(0, rows), out_dtype=out_dtype, resume=resume
    )


def attend_keys_backward(
    spec: Spec,
    implementation: str,
    query: Float[Array, "B T N H"],
    run: KeyRun,
    start: Starts,
    end: Ends,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    dout: Float[Array, "B T N Hv"],
    dquery: PartialSums | None,
    dquery_dtype: jnp.dtype | None,
    dkey_dtype: jnp.dtype,
) -> tuple[PartialSums, Array, Array, Array]:
    """The gradients that flow through the keys of one launch of `attend_keys`.

    Args:
        spec: static settings.
        implementation: one of ``IMPLEMENTATIONS``, as `choose` returns it.
        query: queries of the shard.
        run: keys of this launch.
        start: where each query's sequence starts, relative to the shard.
        end: where each query's sequence ends, as in `attend_keys`.
        lse: log-sum-exp over the keys of all launches.
        delta: ``rowsum(out * dout)`` of the output of all launches, as `delta_of` computes it.
        dout: the output's cotangent.
        dquery: gradient of the queries through the keys of other launches, as these have left it,
            or None.
        dquery_dtype: of the returned gradient of the queries; None in all launches but the last.
        dkey_dtype: of the returned gradients of keys and values.

    Returns:
        dquery with this launch's part added, dkey, dvalue, and ``delta`` with zeros for padding,
        which `sink_logits_gradient` takes. Of dquery holds what `attend_keys` says of a state that
        varies over manual mesh axes.
    """
    start, end = spec.moved(start, end)
    run = spec.moved_run(run)
    inputs = BackwardInputs(query, (run,), None, start, None, dout, lse, end, delta)
    kernels, rows = _implementations.kernels_of(implementation), query.shape[1]
    dquery, ((dkey, dvalue),), _, delta = launch_backward(
        spec, kernels, inputs, dquery, rows=rows, dquery_dtype=dquery_dtype, dkey_dtype=dkey_dtype
    )
    return dquery, dkey, dvalue, delta


def learned_sinks(
    sink_logits: Float[Array, "N"] | None, query: Float[Array, "B T N H"]
) -> Float[Array, "B N"] | None:
    """Learned sinks as `ForwardInputs` has them."""
    if sink_logits is None:
        return None
    shape = (query.shape[0], query.shape[2])
    return jnp.broadcast_to(sink_logits[None], shape).astype(accumulator_dtype(query.dtype))


def sink_logits_gradient(
    sink_logits: Float[Array, "N"] | None, lse: Float[Array, "B N T"], delta: Float[Array, "B N T"]
) -> Float[Array, "N"] | None:
    """A learned sink is a key with the value zero: its logit's gradient is ``-p * delta``."""
    if sink_logits is None:
        return None
    has_keys = lse > -jnp.inf
    learned = sink_logits.astype(lse.dtype)[None, :, None]
    zero = jnp.zeros((), lse.dtype)
    weights = jnp.exp(learned - jnp.where(has_keys, lse, zero))
    weights = jnp.where(has_keys, weights, zero)
    return -(weights * delta).sum((0, 2)).astype(sink_logits.dtype)


def launch_forward(
    spec: Spec,
    kernels: Kernels,
    inputs: ForwardInputs,
    state: State | None,
    *,
    rows: tuple[int, int],
    out_dtype: jnp.dtype,
    resume: bool = False,
) -> State:
    """`Kernels.forward`, under vmap and inside other transformations too."""

    def launch(inputs, state):
        return kernels.forward(spec, inputs, state, rows=rows, resume=resume, out_dtype=out_dtype)

    return _outside_fusions(kernels, _differentiable(launch, kernels)(inputs, state))


def launch_backward(
    spec: Spec,
    kernels: Kernels,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R0 N H"] | PartialSums | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype | None,
    dkey_dtype: jnp.dtype,
) -> Gradients:
    """`Kernels.backward`, under vmap and inside other transformations too."""

    def launch(inputs, dquery):
        return kernels.backward(
            spec, inputs, dquery, rows=rows, dquery_dtype=dquery_dtype, dkey_dtype=dkey_dtype
        )

    return _outside_fusions(kernels, _differentiable(launch, kernels)(inputs, dquery))


def _differentiable(launch: Callable, kernels: Kernels) -> Callable:
    return first_order(launch, has_forward_mode=_implementations.is_plain_jax(kernels))


def _outside_fusions(kernels: Kernels, results: _Results) -> _Results:
    """The results of a launch, kept out of XLA's fusions.

    Where a scan stacks a result, XLA (seen with jax 0.11.2) would let the launch write into the
    stack. What an earlier launch has left in the result's other rows would be missing there, and
    what else reads the result would have a launch of its own.
    """
    if _implementations.is_plain_jax(kernels):
        return results
    return jax.tree.map(lax.optimization_barrier, results)
