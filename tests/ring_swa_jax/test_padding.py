"""Padding: zeros, zero gradients, no NaN, no influence; and cu_seqlens full of garbage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.cases import Case
from tests.helpers.oracle import Result
from tests.helpers.routes import ROUTES, over_ring, run, with_gradients

ROWS = ((-3, 9, -12), (6, -5, 8, -5))
BASE = Case(6, 4, 5, documents=ROWS, batch=2, heads=(4, 2))


@pytest.mark.parametrize("learned", [False, True], ids=["plain", "learned"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_padding_gives_zeros_and_zero_gradients(learned, sinks, implementation):
    case = dataclasses.replace(BASE, learned=learned, sinks=sinks)
    result = run(case, "global", implementation)
    padding = case.segment_ids() < 0
    assert padding.sum() == 25
    for name in ("out", "dq", "dk", "dv"):
        x = getattr(result, name)
        assert (x[padding] == 0).all(), name
        assert np.isfinite(x).all() and (x[~padding] != 0).any(), name


def test_packed_tail_gives_zeros(implementation):
    case = Case(6, 4, 5, 2, ((4, 7, -13),), packed=True, learned=True)
    result = run(case, over_ring(False), implementation)
    for x in result[:4]:
        assert (x[:, 11:] == 0).all() and (x[:, :11] != 0).any()


def test_nothing_but_padding_has_no_gradient(implementation):
    case = dataclasses.replace(BASE, documents=((-24,), (-24,)), learned=True, window=None)
    for x in run(case, "global", implementation):
        assert (x == 0).all()


def test_values_of_padding_do_not_matter(implementation):
    case = dataclasses.replace(BASE, learned=True, sinks=2)
    function, mesh = ROUTES["global"](case, implementation)
    (q, k, v, sink), dout = case.arrays()
    ids = jnp.asarray(case.segment_ids())
    padding = (ids < 0)[:, :, None, None]
    with jax.set_mesh(mesh):
        program = jax.jit(with_gradients(function))
        clean = program(q, k, v, sink, ids, dout)
        dirty = program(*(jnp.where(padding, 1e4, x) for x in (q, k, v)), sink, ids,
                        jnp.where(padding, 1e4, dout))  # fmt: skip
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


GARBAGE = [
    [3, 9, 24],
    [0, 100, 24],
    [0, 9, 4, 24],
    [-7, -1, 30],
    [2**31 - 1, -(2**31), 5],
    [24, 24, 24],
    [0, 0, 0],
    [0, 5, 2**31 - 1],
]


@pytest.mark.parametrize("devices", [1, 4])
def test_garbage_cu_seqlens_stay_in_bounds(devices, implementation):
    case = Case(24 // devices, devices, 5, 2, ((24,),), packed=True, learned=True)
    function, _ = over_ring(False)(case, implementation)
    (q, k, v, sink), dout = case.arrays()
    program = jax.jit(with_gradients(function))
    for entries in GARBAGE:
        cu = jnp.array([*entries, *[entries[-1]] * (4 - len(entries))], jnp.int32)
        result = Result(*program(q, k, v, sink, cu, dout))
        for name, x in zip(Result._fields, result, strict=True):
            assert np.isfinite(x).all(), (name, entries)
        # An output is an average of values, whichever they are: it stays among them.
        assert np.abs(result.out).max() <= np.abs(v).max() * (1 + 1e-5), entries
