"""Padding among documents counts as zeros in the Mosaic GPU kernels, whatever it holds."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import repeated_ring
from tests.helpers.cases import Case
from tests.helpers.oracle import Result
from tests.helpers.routes import compare, with_gradients
from tests.helpers.simulator import launches, simulated

pytestmark = pytest.mark.usefixtures("on_hopper")

FUSED, SHORT = "ring_swa_backward_fused", "ring_swa_backward_short"
SINKS = "ring_swa_backward_sinks"
# Padding, whose length is negative: within a tile, over several tiles, and at the end.
ROWS = ((30, -7, 60, -130, 45), (200, -72))
HALO_ROWS = ((300, -50, 194), (272, -100, 172))
SETTINGS = dict(batch=2, heads=(2, 1), dtype="bfloat16", scale=0.1)
CASES = {
    "window": (FUSED, Case(272, 1, 150, 0, ROWS, dims=(96, 64), softcap=3.0, **SETTINGS)),
    "wide": (FUSED, Case(272, 1, 150, 0, ROWS, dims=(192, 64), **SETTINGS)),
    "short": (SHORT, Case(272, 1, 100, 0, ROWS, dims=(64, 32), **SETTINGS)),
    "no_window": (FUSED, Case(272, 1, None, 0, ROWS, dims=(32, 64), **SETTINGS)),
    # Keys of a halo have no NaN: padding travels as zeros.
    "halo": (FUSED, Case(272, 2, 150, 0, HALO_ROWS, dims=(96, 64), **SETTINGS)),
    # The first sequence has fewer tokens than there are sinks.
    "sinks": (
        SINKS,
        Case(272, 1, 70, 9, ((5, -9, 198, -60), (272,)), dims=(64, 64), **SETTINGS),
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x == "window" else pytest.mark.slow) for x in CASES],
)
def test_nan_in_padding_reaches_no_result(name):
    kernel, case = CASES[name]
    (q, k, v, sink_logits), dout = repeated_ring.arrays(case)
    is_padding = np.asarray(repeated_ring.starts(case)) > np.arange(case.chunk)
    assert is_padding.any()
    q, k, v, dout = (jnp.where(is_padding[..., None, None], jnp.nan, x) for x in (q, k, v, dout))
    function = with_gradients(repeated_ring.last_chunk(case, "mosaic_gpu"))
    with simulated():
        result = Result(*function(q, k, v, sink_logits, None, dout))
        assert kernel in launches
    compare(result, repeated_ring.expected(case), case.dtype, case)
