"""How ``jax.vmap`` and JAX's strict settings meet the kernels.

A mapped axis becomes part of the batch. ``jax_numpy_rank_promotion`` and
``jax_numpy_dtype_promotion`` are for the code of those who set them: kernels of all backends, GPU
kernels among them that no CPU traces, are traced under JAX's defaults.
"""

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
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*arrays)

    @folded.def_vmap
    def rule(size, is_mapped, *arrays):
        def fold(mapped, x):
            if x.ndim == mapped:
                # A scalar is mapped only where it was made to wait for an array that is.
                return x[0] if mapped else x
            x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = folded(*jax.tree.map(fold, tuple(is_mapped), arrays))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return folded
