"""Gradients of a shard_map inside another one that checks which axes a value varies over."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from pallas_kernels import vary_over, varying_axes

Arrays = tuple[Array | None, ...]
"""q, k, v, segment_ids and sink_logits; the fourth has no gradient."""


def varying_outside(arrays: Arrays) -> frozenset[Any]:
    """Manual axes of the surrounding shard_maps over which at least one of the arrays varies.

    Empty outside of any shard_map, and in one with ``check_vma=False``.
    """
    return frozenset().union(*map(varying_axes, jax.tree.leaves(arrays)))


def nested_shard_map(
    attend: Callable[..., Array],
    *,
    arguments: Arrays,
    in_specs: tuple,
    out_specs: Any,
    **settings: Any,
) -> Array:
    """``jax.shard_map(attend, ...)(*arguments)`` where `varying_outside` is not empty.

    Between the passes JAX cuts what a shard_map saves for its gradient over the surrounding axes
    once more, which it cannot lower (jax 0.10 to 0.12). So nothing is saved here: the backward pass
    runs the forward one again. Outside of loops XLA computes the two once.
    """
    outside = varying_outside(arguments)

    @jax.custom_vjp
    def call(*arrays):
        mapped = jax.shard_map(attend, in_specs=in_specs, out_specs=out_specs, **settings)
        return mapped(*arrays)

    def forward(*arrays):
        return call(*arrays), arrays

    def backward(arrays, cotangent):
        def pull(cotangent, q, k, v, segment_ids, sink_logits):
            def of_floats(q, k, v, sink_logits):
                return attend(q, k, v, segment_ids, sink_logits)

            return jax.vjp(of_floats, q, k, v, sink_logits)[1](cotangent)

        dq, dk, dv, dsink_logits = jax.shard_map(
            pull,
            in_specs=(out_specs, *in_specs),
            out_specs=(*in_specs[:3], in_specs[4]),
            **settings,
        )(cotangent, *arrays)
        return dq, dk, dv, None, dsink_logits

    call.defvjp(forward, backward)
    return call(*jax.tree.map(lambda x: vary_over(x, outside), arguments))
