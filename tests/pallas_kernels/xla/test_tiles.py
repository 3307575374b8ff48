"""Windows beside the longest one whose keys are one slice, on rows of several tiles."""

import jax
import pytest

from pallas_kernels._xla.tiles import MAX_WINDOW
from tests.helpers.cases import Case
from tests.helpers.routes import ROUTES, check, with_gradients

DOCUMENTS = ((100, -7, 200, -130, 163), (-1, 330, 269))
CASES = {
    # The last tile of 64 queries is moved back, and documents end anywhere.
    "one_slice": Case(600, 1, 40, documents=DOCUMENTS, batch=2, heads=(4, 2), softcap=3.0),
    "longest_slice": Case(600, 1, MAX_WINDOW, batch=2, learned=True),
    "loop": Case(600, 1, MAX_WINDOW + 1, documents=DOCUMENTS, batch=2, heads=(2, 2)),
    "sinks": Case(300, 1, 40, 3, documents=((100, -7, 193), (-1, 299)), batch=2),
    "both_sides": Case(300, 1, (30, 50), documents=((100, -7, 193), (-1, 299)), batch=2),
    "short_row": Case(50, 1, 60, documents=((20, -3, 27),), heads=(3, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name):
    check(CASES[name], "global_local", "xla")


@pytest.mark.parametrize(("window", "loops"), [(MAX_WINDOW, 2), (MAX_WINDOW + 1, 4)])
def test_loops_of_a_gradient(window, loops):
    case = Case(2 * MAX_WINDOW, 1, window)
    function, mesh = ROUTES["global_local"](case, "xla")
    inputs, dout = case.arrays()
    with jax.set_mesh(mesh):
        text = jax.jit(with_gradients(function)).lower(*inputs, None, dout).as_text()
    assert text.count("stablehlo.while") == loops
