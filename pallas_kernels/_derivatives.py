"""Derivative rules of the kernel launches.

`attend` has its own reverse-mode rule, which runs launches. Its first derivatives therefore never
differentiate a launch; second derivatives do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Shaped

from pallas_kernels._vmap import folds_vmap


def first_order(launch: Callable, *, has_forward_mode: bool) -> Callable:
    """``launch``, differentiable in forward mode only, or not at all; ``jax.vmap`` folds into B.

    Derivatives in reverse mode raise NotImplementedError, and without ``has_forward_mode`` those in
    forward mode too.
    """
    return _forward_mode_only(launch) if has_forward_mode else _no_derivatives(folds_vmap(launch))


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
    guarded = jax.custom_jvp(folds_vmap(launch))

    @guarded.defjvp
    def jvp(primals, tangents):
        structure: Any
        leaves, structure = jax.tree.flatten(primals)
        tangents = structure.flatten_up_to(tangents)
        floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
        # JAX cannot map the derivative of a launch that folds vmap; a derivative folds as well.
        derivative = folds_vmap(partial(_derivative, launch, structure, floats))
        found = derivative(leaves, [tangents[i] for i in floats])
        return guarded(*primals), jax.tree.map(_without_transpose.bind, found)

    return guarded


def _derivative(
    launch: Callable, structure: Any, floats: list[int], leaves: list[Array], tangents: list[Array]
) -> Any:
    """The derivative of a launch along tangents of its floating-point arrays.

    Args:
        launch: the function.
        structure: pytree of its arguments.
        floats: which of its leaves are floating-point arrays.
        leaves: all of them.
        tangents: those of the floating-point ones.
    """

    def of_floats(*values):
        arguments = list(leaves)
        for i, x in zip(floats, values, strict=True):
            arguments[i] = x
        return launch(*jax.tree.unflatten(structure, arguments))

    return jax.jvp(of_floats, tuple(leaves[i] for i in floats), tuple(tangents))[1]


def _refuse(*_):
    raise NotImplementedError(
        "the attention has first derivatives in reverse mode, and with implementation='xla' those "
        "of jax.grad in forward mode: jax.hessian(f), or jax.jvp(jax.grad(f), ...); for other "
        "second derivatives take reference_attention, on one device"
    )


# The identity, which refuses to be transposed, as reverse mode does with tangents. JAX's own way to
# say that, linear_call, has no rule for vmap, which jax.hessian needs.
_without_transpose = Primitive("ring_swa_without_transpose")
_without_transpose.def_impl(lambda x: x)
_without_transpose.def_abstract_eval(lambda x: x)
ad.deflinear2(_without_transpose, _refuse)
batching.defvectorized(_without_transpose)
mlir.register_lowering(_without_transpose, lambda _, x: [x])
