"""Every exchange and layout computes what the oracle does, output and gradients."""

import dataclasses
import random

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.helpers.cases import Case, random_case
from tests.helpers.exchanges import check, per_shard, whole_arrays
from tests.helpers.routes import with_gradients

EXCHANGES = ("all_to_all", "ring")
TWO_DOCUMENTS = ((9, 16, -3), (2, 26))
FULL = {
    # Fewer key/value heads than devices, batch, learned sinks, soft cap, Hv other than H.
    "all_features": Case(
        7, 4, None, batch=2, heads=(4, 2), dims=(16, 32), softcap=2.0, learned=True
    ),
    "packed": Case(8, 4, None, documents=((3, 11, 0, 12, -6),), packed=True, heads=(4, 1)),
    "two_devices": Case(5, 2, None, heads=(6, 3)),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "name", [*list(FULL)[:2], pytest.param("two_devices", marks=pytest.mark.slow)]
)
def test_without_a_window(name, exchange):
    check(FULL[name], per_shard(exchange))


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", FULL)
def test_without_check_vma(name, exchange):
    check(FULL[name], per_shard(exchange, check_vma=False))


@pytest.mark.parametrize("exchange", ["all_to_all", pytest.param("ring", marks=pytest.mark.slow)])
def test_learned_sinks_gradient_is_summed_once_in_both_modes(exchange):
    case = Case(4, 2, None, batch=2, heads=(4, 2), learned=True)
    for check_vma in (True, False):
        check(case, per_shard(exchange, check_vma=check_vma))


@pytest.mark.parametrize("exchange", ["all_to_all", pytest.param("ring", marks=pytest.mark.slow)])
def test_documents_by_ids(exchange):
    case = Case(7, 4, None, documents=TWO_DOCUMENTS, batch=2, heads=(4, 2), learned=True)
    check(case, whole_arrays(exchange))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(3, 8, None, heads=(2, 1), learned=True), marks=pytest.mark.slow),
        Case(4, 4, None, heads=(6, 2)),
        pytest.param(Case(1, 8, None, heads=(3, 1)), marks=pytest.mark.slow),
        pytest.param(Case(1, 2, None), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_ring_of_more_devices_than_heads(case):
    check(case, per_shard(None))


@pytest.mark.parametrize(
    "case",
    [
        Case(6, 4, 7, sinks=8, batch=2, heads=(4, 2), learned=True),  # more sinks than a chunk
        pytest.param(Case(5, 4, 2, heads=(8, 8)), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_heads_are_exchanged_under_a_window_too(case):
    check(case, per_shard("all_to_all"))


@pytest.mark.parametrize("exchange", ["all_to_all", pytest.param("ring", marks=pytest.mark.slow)])
def test_the_sequence_over_two_axes(exchange):
    case = Case(4, 4, None, heads=(4, 2))
    check(case, per_shard(exchange, axes=("outer", "inner")))


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("exchange", ["all_to_all", pytest.param("ring", marks=pytest.mark.slow)])
def test_batch_and_heads_on_other_axes(exchange, kind):
    case = Case(4, 2, None, batch=2, heads=(8, 4), learned=True)
    axes = dict(batch_axis="data", head_axis="model")
    route = whole_arrays(exchange, axis_type=kind, sizes=dict(data=2, seq=2, model=2), **axes)
    check(case, route, spec=P("data", "seq", "model"))


DOCUMENTS_OF_24 = ((9, 12, -3), (2, 22))
DUAL = [
    (Case(6, 4, None, documents=DOCUMENTS_OF_24, batch=2, learned=True), None),
    (Case(6, 4, None, heads=(4, 1), learned=True), "all_to_all"),
    (Case(6, 4, 7, sinks=2, documents=DOCUMENTS_OF_24, batch=2, learned=True), None),
]
SLOW_DUAL = [
    (Case(4, 8, 5, learned=True), "halo"),
    (Case(4, 3, None, heads=(3, 1), documents=((5, 7),)), "all_to_all"),
    (Case(4, 4, 3, sinks=5, heads=(4, 2)), "all_to_all"),
    (Case(2, 1, None), None),
]


@pytest.mark.parametrize(
    ("case", "exchange"), DUAL + [pytest.param(*x, marks=pytest.mark.slow) for x in SLOW_DUAL]
)
def test_dual_chunk_order(case, exchange):
    check(case, whole_arrays(exchange, "dual_chunk"))


@pytest.mark.slow
def test_dual_chunk_order_on_explicit_axes():
    check(
        Case(4, 2, None, learned=True),
        whole_arrays("ring", "dual_chunk", axis_type=AxisType.Explicit),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_cases(seed):
    rng = random.Random(seed)
    exchange = EXCHANGES[seed % 2]
    case = random_case(rng)
    if exchange == "ring":
        case = dataclasses.replace(case, window=None, sinks=0)
    else:
        case = dataclasses.replace(case, heads=(case.devices * rng.choice([1, 2]), 1))
    whole = case.documents is not None and not case.packed
    check(case, whole_arrays(exchange) if whole else per_shard(exchange))


@pytest.mark.parametrize("exchange", ["all_to_all", pytest.param("ring", marks=pytest.mark.slow)])
def test_two_runs_have_the_same_bits(exchange):
    case = Case(4, 4, None, heads=(4, 1), learned=True, dtype="bfloat16")
    function, mesh = per_shard(exchange)(case, "xla")
    inputs, dout = case.arrays()
    with jax.set_mesh(mesh):
        program = jax.jit(with_gradients(function))
        first, second = (jax.device_get(program(*inputs, None, dout)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
