"""Derivative rules of the kernel launches.

`attend` has its own reverse-mode rule, which runs launches. Its first derivatives therefore never
differentiate a launch; second derivatives do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import linear_call
from jaxtyping import Shaped


def first_order(launch: Callable, *, has_forward_mode: bool) -> Callable:
    """``launch``, differentiable in forward mode only, or not at all.

    Derivatives in reverse mode raise NotImplementedError, and without ``has_forward_mode`` those in
    forward mode too.
    """
    return _forward_mode_only(launch) if has_forward_mode else _no_derivatives(launch)


def _no_derivatives(launch: Callable) -> Callable:
    # The rule is on the inputs, not on the launch: inside a custom_jvp JAX cannot lower a Mosaic
    # GPU kernel that writes in place.
    def guarded(*arrays):
        return launch(*jax.tree.map(_undifferentiable, arrays))

    return guarded


@jax.custom_jvp
def _undifferentiable(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    return x


@_undifferentiable.defjvp
def _undifferentiable_jvp(primals: tuple, tangents: tuple):
    _refuse()


def _forward_mode_only(launch: Callable) -> Callable:
    guarded = jax.custom_jvp(launch)

    @guarded.defjvp
    def jvp(primals, tangents):
        structure: Any
        flat, structure = jax.tree.flatten(primals)
        tangents = structure.flatten_up_to(tangents)
        places = [i for i, x in enumerate(flat) if jnp.issubdtype(x.dtype, jnp.floating)]

        def push(flat, moved):
            def along(*floats):
                arguments = list(flat)
                for i, x in zip(places, floats, strict=True):
                    arguments[i] = x
                return launch(*jax.tree.unflatten(structure, arguments))

            return jax.jvp(along, tuple(flat[i] for i in places), tuple(moved))[1]

        moved = [tangents[i] for i in places]
        return guarded(*primals), linear_call(push, _refuse, flat, moved)

    return guarded


def _refuse(*_):
    raise NotImplementedError(
        "the attention has first derivatives in reverse mode, and with implementation='xla' those "
        "of jax.grad in forward mode, jax.jvp(jax.grad(f), ...); for other second derivatives take "
        "reference_attention, on one device"
    )
