"""Slices at a traced index, under vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._slices import slice_in_dim, update_in_dim

X = jnp.arange(2 * 3 * 5 * 4.0).reshape(2, 3, 5, 4)
NEW = -jnp.ones((2, 3, 2, 4))


def sliced(x, begin):
    return slice_in_dim(x, begin, 2, axis=1)


def updated(x, new, begin):
    return update_in_dim(x, new, begin, axis=1)


@pytest.mark.parametrize("maps", [1, 2])
def test_a_shared_index_makes_no_gather_and_no_scatter(maps):
    # The axis counts within what is mapped, so the mapped axes come before it.
    x, new = (X, NEW) if maps == 1 else (X[None], NEW[None])
    slices, updates = sliced, updated
    for _ in range(maps):
        slices = jax.vmap(slices, in_axes=(0, None))
        updates = jax.vmap(updates, in_axes=(0, 0, None))
    text = f"{jax.make_jaxpr(slices)(x, 3)} {jax.make_jaxpr(updates)(x, new, 3)}"
    assert "gather" not in text and "scatter" not in text
    np.testing.assert_array_equal(slices(x, 3), x[..., 3:5, :])
    np.testing.assert_array_equal(updates(x, new, 3), x.at[..., 3:5, :].set(new))


def test_an_index_of_each_row():
    begins = jnp.array([3, 1])
    got = jax.vmap(sliced)(X, begins)
    np.testing.assert_array_equal(got, jnp.stack([X[0, :, 3:5], X[1, :, 1:3]]))
    shared = jax.vmap(updated, in_axes=(0, None, None))(X, NEW[0], 3)
    np.testing.assert_array_equal(shared, X.at[:, :, 3:5].set(NEW[0]))
