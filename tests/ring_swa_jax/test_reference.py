"""reference_attention and segment_positions against the oracle and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ring_swa_jax as rsj
from tests.helpers.cases import Case
from tests.helpers.oracle import starts_from_segment_ids
from tests.helpers.routes import check

ROWS = ((5, 0, 9, -3, 4, -2), (-2, 1, 20))


@pytest.mark.parametrize("window", [0, 3, 23, None])
@pytest.mark.parametrize("sinks", [0, 2])
def test_reference_equals_oracle(window, sinks):
    case = Case(
        23, 1, window, sinks, ROWS, batch=2,
        heads=(4, 2), dims=(16, 8), softcap=3.0, learned=True, scale=0.4,
    )  # fmt: skip
    check(case, "reference")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reference_in_low_precision(dtype):
    check(Case(23, 1, 4, 2, ROWS, batch=2, learned=True, dtype=dtype), "reference")


def test_reference_defaults_are_full_causal():
    check(Case(9, 1, None), "reference")
    case = Case(9, 1, None)
    (q, k, v, _), _ = case.arrays()
    np.testing.assert_allclose(rsj.reference_attention(q, k, v), case.expected.out, atol=1e-5)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=12, max_size=12), min_size=2, max_size=2))
def test_segment_positions_restart_where_the_id_changes(rows):
    got = np.asarray(rsj.segment_positions(jnp.array(rows, jnp.int32)))
    assert got.shape == (len(rows), 12) and got.dtype == np.int32
    for row, positions in zip(rows, got, strict=True):
        starts = starts_from_segment_ids(row)
        real = starts >= 0
        assert positions[real].tolist() == (np.arange(12) - starts)[real].tolist()
        assert (positions >= 0).all()


def test_segment_positions_under_jit_and_vmap():
    ids = jnp.array([[0, 0, 1, 1, 1], [3, 0, 0, 3, 3]])
    want = [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]
    assert jax.jit(rsj.segment_positions)(ids).tolist() == want
    assert jax.vmap(rsj.segment_positions)(ids[None])[0].tolist() == want
