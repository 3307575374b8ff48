"""The same inputs give the same bits."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.cases import Case
from tests.helpers.routes import ROUTES, documents_of, run, with_gradients

CASES = {
    "segments": Case(8, 4, 11, 3, ((7, 20, -5), (9, 23)), batch=2, heads=(4, 2), learned=True),
    "packed": Case(8, 4, 5, 2, ((7, 20, -5),), packed=True, learned=True, dtype="bfloat16"),
}


@pytest.mark.parametrize("name", ["segments", pytest.param("packed", marks=pytest.mark.slow)])
def test_two_runs_and_two_compilations_give_the_same_bits(name, implementation):
    case = CASES[name]
    function, mesh = ROUTES["shard_novma" if case.packed else "global"](case, implementation)
    inputs, dout = case.arrays()
    with jax.set_mesh(mesh):
        results = []
        for _ in range(2):
            program = jax.jit(with_gradients(lambda *x: function(*x)))
            results += [program(*inputs, documents_of(case), dout) for _ in range(2)]
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert np.abs(np.asarray(results[0].out, np.float32)).max() > 0.1


def test_devices_and_shardings_agree_to_rounding(implementation):
    case = dataclasses.replace(CASES["segments"], chunk=32, devices=1)
    one = run(case, "global_local", implementation)
    for devices in (2, 8):
        split = dataclasses.replace(case, chunk=32 // devices, devices=devices)
        for a, b in zip(run(split, "global", implementation), one, strict=True):
            assert np.linalg.norm(a - b) <= 4e-6 * np.linalg.norm(b), devices
