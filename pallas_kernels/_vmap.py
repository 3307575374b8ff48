"""How ``jax.vmap`` meets the kernels: the mapped axis becomes part of the batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def folds_vmap(function: Callable) -> Callable:
    """Wraps ``function(*arrays)`` so that vmap folds its axis into the leading batch axis.

    Every array that goes in or comes out has the batch as its first axis, except scalars, which
    are the same for the whole batch.
    """

    @custom_vmap
    def folded(*arrays):
        return function(*arrays)

    @folded.def_vmap
    def rule(size, is_mapped, *arrays):
        def fold(mapped, x):
            if not mapped and x.ndim == 0:
                return x
            x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = folded(*jax.tree.map(fold, tuple(is_mapped), arrays))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return folded
