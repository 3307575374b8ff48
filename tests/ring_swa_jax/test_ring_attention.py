"""ring_attention on global arrays: meshes of both kinds, every way to name axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers.cases import Case
from tests.helpers.routes import check, make_mesh, over_mesh, ring_attention

ROWS = ((5, 9, -2, 12), (11, 1, 16))
CASE = Case(7, 4, 8, 3, ROWS, batch=2, heads=(4, 2), learned=True)
SMALL = Case(6, 2, 7, 2, ((5, 7), (12,)), batch=2, heads=(4, 2), learned=True)
CUBE = dict(data=2, seq=2, model=2)
AXES = dict(batch_axis="data", seq_axis="seq", head_axis="model")
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


@KINDS
def test_set_mesh(kind, implementation):
    check(CASE, over_mesh(kind), implementation)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "nojit"])
def test_mesh_argument(jit, implementation):
    mesh = make_mesh(seq=4)

    def build(case, implementation):
        return ring_attention(case, implementation, mesh=mesh), None

    check(CASE, build, implementation, jit=jit)


@KINDS
def test_without_jit(kind, implementation):
    check(SMALL, over_mesh(kind), implementation, jit=False)


@KINDS
def test_batch_and_heads_sharded(kind, implementation):
    spec = P("data", "seq", "model")
    check(SMALL, over_mesh(kind, CUBE, **AXES), implementation, spec=spec)


def test_explicit_axes_are_read_from_the_inputs(implementation):
    spec = P("data", "seq", "model")
    check(SMALL, over_mesh(AxisType.Explicit, CUBE), implementation, spec=spec)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_sequence_over_a_tuple(kind, implementation):
    sizes, axes = dict(outer=2, inner=2), ("outer", "inner")
    check(CASE, over_mesh(kind, sizes, seq_axis=axes), implementation, spec=P(None, axes))


def test_batch_over_a_tuple(implementation):
    sizes = dict(a=2, seq=2, b=2)
    case = Case(5, 2, 3, 1, ((10,), (3, 7), (9, -1), (4, 6)), batch=4, learned=True)
    check(case, over_mesh(sizes=sizes, batch_axis=("a", "b")), implementation)


def test_other_mesh_axes_may_be_unused(implementation):
    check(SMALL, over_mesh(sizes=dict(seq=2, other=2)), implementation)


def test_sequence_local_batch_sharded(implementation):
    case = Case(14, 1, 5, 2, ((5, 9), (14,)), batch=2, heads=(4, 2), learned=True)
    route = over_mesh(sizes=dict(data=2), seq_axis=None, batch_axis="data")
    check(case, route, implementation)


def test_sequence_local_without_any_mesh(implementation):
    def build(case, implementation):
        return ring_attention(case, implementation, seq_axis=None), None

    check(Case(14, 1, 5, 2, ((5, 9), (-4, 10)), batch=2, learned=True), build, implementation)


def test_defaults_are_full_causal():
    case = Case(4, 4, None)
    (q, k, v, _), _ = case.arrays()
    with jax.set_mesh(make_mesh(seq=4)):
        out = rsj.ring_attention(q, k, v)
    np.testing.assert_allclose(out, case.expected.out, atol=1e-5)


def test_segment_ids_of_any_integer_dtype():
    case = Case(4, 2, 3, 1, ((3, 5),))
    (q, k, v, _), _ = case.arrays()
    mesh = make_mesh(seq=2)
    for dtype in (np.int8, np.int32, np.int16):
        ids = jnp.asarray(case.segment_ids(), dtype)
        out = rsj.ring_attention(
            q, k, v, window_size=3, num_sink_tokens=1, segment_ids=ids, mesh=mesh
        )
        np.testing.assert_allclose(out, case.expected.out, atol=1e-5)


def test_output_stays_sharded():
    mesh = make_mesh(data=2, seq=4)
    case = Case(4, 4, 3, batch=2)
    sharding = NamedSharding(mesh, P("data", "seq"))
    (q, k, v, _), _ = case.arrays()
    q, k, v = (jax.device_put(x, sharding) for x in (q, k, v))

    @jax.jit
    def attend(q, k, v):
        return rsj.ring_attention(q, k, v, window_size=3, mesh=mesh, batch_axis="data")

    assert attend(q, k, v).sharding.is_equivalent_to(sharding, 4)
