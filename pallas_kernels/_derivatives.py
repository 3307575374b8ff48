"""What the launches of the kernels say when they are differentiated.

`attend` has a reverse-mode rule of its own, made of launches. Its first derivatives never
differentiate a launch; second derivatives do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call


def first_order(launch: Callable, *, has_forward_mode: bool) -> Callable:
    """``launch`` with derivatives in forward mode where JAX finds them, and none in reverse mode.

    Differentiating it otherwise raises NotImplementedError.
    """
    guarded = jax.custom_jvp(launch)

    @guarded.defjvp
    def jvp(primals, tangents):
        if not has_forward_mode:
            _refuse()
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
