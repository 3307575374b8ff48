"""Derivatives beyond the first in reverse mode: what works is right, the rest says so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj
from tests.helpers.layers import quick
from tests.helpers.routes import make_mesh

Q, K, V, DIRECTION = jax.random.normal(jax.random.key(0), (4, 1, 8, 2, 16))
OPTIONS = dict(
    window_size=3,
    num_sink_tokens=1,
    segment_ids=jnp.array([[0, 0, 0, 1, 1, 1, 1, -1]]),
    sink_logits=jnp.ones(2),
)


def loss_of(attend):
    return lambda q: (attend(q, K, V, **OPTIONS) ** 3).sum()


def product(loss):
    """Hessian times direction, forward over reverse."""
    return jax.jvp(jax.grad(loss), (Q,), (DIRECTION,))[1]


@pytest.mark.parametrize("cut", [False, True])
def test_forward_over_reverse(cut):
    right = quick(lambda: product(loss_of(rsj.reference_attention)))()
    where = dict(mesh=make_mesh(seq=4)) if cut else dict(seq_axis=None)
    attend = functools.partial(rsj.ring_attention, implementation="xla", **where)
    np.testing.assert_allclose(quick(lambda: product(loss_of(attend)))(), right, atol=2e-5)


@pytest.mark.parametrize("cut", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hessian(cut):
    """All products at once: JAX maps them over a basis."""
    right = quick(jax.hessian(loss_of(rsj.reference_attention)))(Q)
    where = dict(mesh=make_mesh(seq=4)) if cut else dict(seq_axis=None)
    attend = functools.partial(rsj.ring_attention, implementation="xla", **where)
    np.testing.assert_allclose(quick(jax.hessian(loss_of(attend)))(Q), right, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_reverse_over_reverse_says_what_there_is(implementation):
    attend = functools.partial(rsj.ring_attention, seq_axis=None, implementation=implementation)
    loss = loss_of(attend)
    with pytest.raises(NotImplementedError, match="reference_attention"):
        jax.grad(lambda q: (jax.grad(loss)(q) * DIRECTION).sum())(Q)


def test_other_implementations_have_first_derivatives_only():
    attend = functools.partial(rsj.ring_attention, seq_axis=None, implementation="triton")
    with pytest.raises(NotImplementedError, match="reference_attention"):
        product(loss_of(attend))
