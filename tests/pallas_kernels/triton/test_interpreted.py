"""The Pallas-Triton kernels in Pallas' interpreter, with tiles so small that every loop runs."""

import dataclasses
import random

import jax
import pytest

from pallas_kernels._triton import backward_sinks, kernels
from pallas_kernels._triton.tiles import TritonPlan, TritonTiles, sink_tile
from tests.helpers import repeated_ring
from tests.helpers.cases import Case, random_case
from tests.helpers.oracle import Result
from tests.helpers.routes import check, compare, over_ring, per_shard, with_gradients
from tests.helpers.twins import PACKED, WHOLE, compare_each, stacked, twins

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="tests/pallas_kernels/test_gpu.py does it"
)

CASES = {
    "ragged": Case(70, 1, 20, heads=(4, 2), batch=2),
    "full_causal": Case(64, 1, None, dims=(48, 16)),
    "rows_before_halo": Case(48, 3, 10, heads=(4, 2), learned=True),
    "long_halo": Case(33, 2, 30, softcap=2.0),
    "hops_documents_sinks": Case(
        33, 3, 50, 2, ((40, 59), (7, -3, 60, 29)), batch=2, learned=True, dims=(16, 32)
    ),
    "sinks_of_earlier_devices": Case(20, 4, 9, 17, ((17, 63),), packed=True, heads=(3, 1)),
    "distant_sinks": Case(80, 2, 9, 3, ((7, 110, 43), (150, 10)), batch=2, heads=(4, 2)),
    # A query's distance from its moved sinks is 30 more than that from its sequence's start.
    "both_sides_distant_sinks": Case(
        83, 1, (0, 30), 3, ((-9, 74), (13, -2, 68)), batch=2, heads=(2, 1)
    ),
    "both_sides_no_bound_after": Case(31, 1, (2, None), 3),
    "head_parts": Case(21, 2, 9, dims=(96, 96), dtype="float16", batch=2),
    "head_parts_192_128": Case(20, 2, 17, dims=(192, 128), learned=True),
    "bfloat16": Case(40, 2, 17, 3, ((25, 55),), dtype="bfloat16", heads=(4, 2), learned=True),
}


@pytest.fixture(params=[True, False], ids=["unmasked_loop", "one_loop"])
def small_tiles(request, monkeypatch):
    """Tiles of 16 x 16, with and without a loop for tiles that need no mask.

    Tiles of queries hold one head, or two where a group has as many.
    """
    tiles = TritonTiles(16, 16, 4, 2, unmasked_loop=request.param)
    rows = tiles if request.param else TritonTiles(8, 16, 4, 2, unmasked_loop=False, heads=2)

    def plan(implementation, shapes, gpu):
        fitted = rows.of_group(shapes.group)
        dvalue = fitted if shapes.head_dim == 48 else None
        sinks = dataclasses.replace(fitted, key=sink_tile(shapes.num_sinks))
        return TritonPlan(fitted, fitted, fitted, dvalue, sinks)

    monkeypatch.setattr(kernels, "triton_plan", plan)
    monkeypatch.setattr(backward_sinks, "SINK_CHUNK", 32)
    return request.param


def check_triton(case):
    """By a route that works without check_vma, which Pallas' interpreter does not know."""
    check(case, "shard_novma" if case.packed else "global", "triton")


def check_last_chunk(case):
    """On one device, which is much quicker than a ring."""
    function = repeated_ring.last_chunk(case, "triton")
    inputs, dout = repeated_ring.arrays(case)
    arguments = (*inputs, None, dout)
    options = {"xla_backend_optimization_level": 0}
    program = jax.jit(with_gradients(function)).lower(*arguments).compile(compiler_options=options)
    result = Result(*program(*arguments))
    compare(result, repeated_ring.expected(case), case.dtype, case)


@pytest.mark.parametrize("name", [
    "ragged", "rows_before_halo", "both_sides_distant_sinks", "both_sides_no_bound_after",
])  # fmt: skip
@pytest.mark.parametrize("small_tiles", [True], indirect=True, ids=["unmasked_loop"])
def test_case(name, small_tiles):
    check_triton(CASES[name])


@pytest.mark.parametrize("name", ["hops_documents_sinks", "head_parts"])
@pytest.mark.parametrize("small_tiles", [True], indirect=True, ids=["unmasked_loop"])
def test_last_chunk(name, small_tiles):
    check_last_chunk(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case(name, small_tiles):
    check_triton(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.devices > 1])
@pytest.mark.parametrize("small_tiles", [False], indirect=True, ids=["one_loop"])
def test_every_last_chunk(name, small_tiles):
    check_last_chunk(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("case", [WHOLE, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("small_tiles", [False], indirect=True, ids=["one_loop"])
def test_vmap(case, small_tiles):
    """Gradients of vmap on one device, and vmap of gradients over a ring."""
    pair = twins(case)
    ring, _ = over_ring(False)(case, "triton")
    alone = jax.vmap(per_shard(dataclasses.replace(case, chunk=20, devices=1), None, "triton"))
    for program in (jax.vmap(with_gradients(ring)), with_gradients(alone)):
        compare_each(jax.jit(program)(*stacked(pair)), pair)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1006), ids=lambda seed: f"random-{seed}")
def test_random_case(seed, small_tiles):
    case = random_case(random.Random(seed))
    if any(dim % 16 for dim in case.dims):
        pytest.skip(f"Triton takes multiples of 16, not {case.dims}")
    check_triton(case)
