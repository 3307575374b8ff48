"""NaN in one row of a batch leaves all other rows as they are, to the bit."""

import contextlib

import jax
import numpy as np
import pytest

from tests.helpers.cases import Case
from tests.helpers.exchanges import whole_arrays
from tests.helpers.layers import quick
from tests.helpers.routes import ROUTES, documents_of, with_gradients

ROWS = ((7, 9), (16,))
CASES = {
    "one_device": (ROUTES["one_device"], Case(16, 1, None, batch=2)),
    # The last of three hops leaves when a number of the first one's gradients is known.
    "hops": (whole_arrays("halo"), Case(4, 4, 10, 2, batch=2)),
}
MORE = {
    "both_sides": (whole_arrays("halo"), Case(4, 4, (10, 5), 2, ROWS, batch=2)),
    "all_to_all": (whole_arrays("all_to_all"), Case(8, 2, None, batch=2, heads=(4, 2))),
    "ring": (whole_arrays("ring"), Case(5, 3, None, batch=2)),
    "ring_documents": (whole_arrays("ring"), Case(4, 4, None, documents=ROWS, batch=2)),
    "ring_both_sides": (whole_arrays("ring"), Case(4, 4, (None, 3), batch=2)),
}


@pytest.mark.parametrize(
    ("route", "case"),
    [
        *(pytest.param(*CASES[name], id=name) for name in CASES),
        *(pytest.param(*MORE[name], id=name, marks=pytest.mark.slow) for name in MORE),
    ],
)
def test_other_rows_are_as_without_nan(route, case):
    function, mesh = route(case, "xla")
    arrays, dout = case.arrays()
    program = quick(with_gradients(function))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        first = program(*arrays, documents_of(case), dout)
        for token in (0, -case.chunk):  # the batch's first number, and the last chunk's
            with_nan = (None if x is None else x.at[0, token].set(np.nan) for x in arrays)
            second = program(*with_nan, documents_of(case), dout)
            for x, y in zip(first[:4], second[:4], strict=True):
                assert np.isnan(y[0]).any()
                np.testing.assert_array_equal(x[1], y[1])
