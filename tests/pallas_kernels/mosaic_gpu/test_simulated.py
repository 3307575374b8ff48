"""The Mosaic GPU kernels on a CPU, one operation after the other, beside the oracle.

`tests.pallas_kernels.test_gpu` runs many more cases, on a GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Spec
from pallas_kernels._kernels import BackwardInputs
from pallas_kernels._mosaic_gpu.backward import choice, task_splits
from pallas_kernels._spec import KeyRun
from tests.helpers import repeated_ring
from tests.helpers.cases import Case
from tests.helpers.oracle import Result
from tests.helpers.routes import ROUTES, compare, with_gradients
from tests.helpers.simulator import launches, simulated

FORWARD, FINISH = "ring_swa_forward", "ring_swa_backward_finish"
FUSED, SHORT = "ring_swa_backward_fused", "ring_swa_backward_short"
SINKS = "ring_swa_backward_sinks"
OWN, ANY, SOME = {FORWARD, FUSED}, {FORWARD, FUSED, FINISH}, {FORWARD, FUSED, SINKS}
ROWS = ((20, 110, -10, 60), (200,))
HALF = dict(dtype="bfloat16", scale=0.1)

# The kernels that are launched, and the last chunk of a ring that they compute. Half of the chunks
# are no multiple of 8 tokens.
CASES = {
    "no_window": (ANY, Case(136, 1, None, heads=(4, 2), dims=(96, 48), **HALF)),
    "window": (OWN, Case(203, 1, 150, dims=(128, 128), learned=True, **HALF)),
    "window_rows": (
        ANY,
        Case(200, 1, 70, 0, ROWS, batch=2, dims=(96, 64), softcap=3.0, dtype="float16"),
    ),
    "padding_tiles": (
        ANY,
        Case(336, 1, 40, 0, ((30, -250, 56), (336,)), batch=2, dims=(96, 64), **HALF),
    ),
    "no_window_rows": (ANY, Case(257, 1, None, 0, ((100, 157),), dims=(32, 64), **HALF)),
    "halo": (ANY, Case(143, 2, 70, dims=(128, 32), dtype="bfloat16", scale=-0.1)),
    "hops_rows": (
        ANY,
        Case(71, 3, 140, 0, ((30, 100, 83), (213,)), batch=2, dims=(32, 96), **HALF),
    ),
    "sinks": (SOME, Case(196, 1, 80, 5, heads=(3, 1), dims=(64, 64), **HALF)),
    "sinks_in_halo": (
        SOME,
        Case(136, 2, 64, 3, ((70, 202),), packed=True, dims=(64, 128), **HALF),
    ),
    "sinks_rows": (
        SOME,
        Case(136, 2, 63, 64, ((3, 180, 89), (272,)), batch=2, dims=(64, 96), **HALF),
    ),
    "wide": (ANY, Case(193, 1, 100, dims=(256, 256), softcap=3.0, **HALF)),
    "wide_values": (ANY, Case(136, 1, None, dims=(192, 64), **HALF)),
    "wide_halo": (
        ANY,
        Case(136, 2, 90, 0, ((30, 170, 72), (272,)), batch=2, dims=(192, 128), **HALF),
    ),
    "wide_hops": (ANY, Case(69, 3, 100, dims=(192, 128), heads=(1, 1), **HALF)),
    "wide_sinks": (
        SOME,
        Case(136, 2, 64, 3, ((70, 202), (272,)), batch=2, dims=(256, 192), **HALF),
    ),
    "short": (
        {FORWARD, SHORT},
        Case(263, 1, 128, heads=(4, 2), dims=(64, 64), learned=True, **HALF),
    ),
    "short_rows": (
        ANY,
        Case(133, 2, 40, 0, ((80, 84, 102), (266,)), batch=2, dims=(64, 32), softcap=3.0, **HALF),
    ),
}


LONG = {"sinks_in_halo", "sinks_rows", "wide_sinks", "wide_halo", "wide_hops", "hops_rows"}
LONG |= {"no_window_rows", "wide_values", "short_rows"}
"""Cases of several seconds, whose kernels other cases launch too."""


pytestmark = pytest.mark.usefixtures("on_hopper")


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, "mosaic_gpu", marks=[pytest.mark.slow] if name in LONG else [])
        for name in CASES
    ]
    + [(name, "mosaic_gpu_nondeterministic") for name in ("window_rows", "wide")],
)
def test_kernels_compute_what_the_oracle_does(name, implementation):
    kernels, case = CASES[name]
    if implementation != "mosaic_gpu":  # no program knows that it adds last to dq
        kernels = kernels | {FINISH}
    inputs, dout = repeated_ring.arrays(case)
    function = with_gradients(repeated_ring.last_chunk(case, implementation))
    with simulated():
        result = Result(*function(*inputs, None, dout))
        assert set(launches) == kernels
    compare(result, repeated_ring.expected(case), case.dtype, case)


@pytest.mark.slow
def test_sinks_where_nothing_is_fetched():
    _, case = CASES["sinks"]
    inputs, dout = case.arrays()
    function, _ = ROUTES["one_device"](case, "mosaic_gpu")
    with jax.disable_jit(), simulated():
        result = Result(*with_gradients(function)(*inputs, None, dout))
        assert set(launches) == SOME
    compare(result, case.expected, case.dtype, case)


APART = {
    "halo": ANY,
    "sinks_in_halo": SOME | {FINISH},
    "wide_sinks": SOME | {FINISH},
    "short_rows": {FORWARD, SHORT, FUSED, FINISH},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in APART],
)
def test_a_halo_in_a_launch_of_its_own(name, monkeypatch):
    """As where a kernel for both is not the fastest one."""
    _, case = CASES[name]
    monkeypatch.setattr(choice, "can_join", lambda spec, runs, key_tile: len(runs) == 1)
    inputs, dout = repeated_ring.arrays(case)
    function = with_gradients(repeated_ring.last_chunk(case, "mosaic_gpu"))
    with simulated():
        result = Result(*function(*inputs, None, dout))
        assert set(launches) == APART[name]
        assert sum(launches.count(kernel) for kernel in (FUSED, SHORT)) == 2
    compare(result, repeated_ring.expected(case), case.dtype, case)


SPLIT = {
    "window_rows": dict(heads=(8, 2)),
    "no_window": dict(heads=(8, 2)),
    "no_window_rows": dict(heads=(6, 1)),
    "hops_rows": dict(heads=(4, 1)),
    "halo": dict(heads=(4, 1)),
    "sinks": dict(heads=(4, 1)),
    "wide": dict(heads=(4, 1)),
    "wide_halo": dict(heads=(4, 1)),
}


FEW_SPLITS = [("no_window", 2, False)]
MORE_SPLITS = [(name, 2, True) for name in SPLIT]
MORE_SPLITS += [("hops_rows", None, True), ("halo", 2, False)]


@pytest.mark.parametrize(
    ("name", "parts", "all_tasks"),
    [*FEW_SPLITS, *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE_SPLITS)],
)
def test_programs_that_split_a_task(name, parts, all_tasks, monkeypatch):
    """In parts of several heads, or of one head each."""
    kernels, case = CASES[name]
    case = dataclasses.replace(case, **SPLIT[name])
    group_sizes = []

    def split(devices, group_size, num_sms, counts, **_):
        group_sizes.append(group_size)
        return len(devices[0]) if all_tasks else min(3, len(devices[0])), parts or group_size

    monkeypatch.setattr(task_splits, "choose_split", split)
    task_splits.split_last_tasks.cache_clear()
    inputs, dout = repeated_ring.arrays(case)
    function = with_gradients(repeated_ring.last_chunk(case, "mosaic_gpu"))
    with simulated():
        result = Result(*function(*inputs, None, dout))
        assert set(launches) == kernels
    task_splits.split_last_tasks.cache_clear()
    assert set(group_sizes) == {case.heads[0] // case.heads[1]}
    compare(result, repeated_ring.expected(case), case.dtype, case)


@pytest.mark.parametrize("dims", [(80, 80), (96, 192), (128, 192), (160, 160), (256, 80)])
def test_head_sizes_that_are_left_to_other_kernels(dims):
    (query, key, value, _), dout = repeated_ring.arrays(Case(8, 1, None, dims=dims, **HALF))
    spec = Spec(None, 0, 0.1, None, None)
    run, lse = KeyRun(key, value, 0), jnp.zeros((1, query.shape[2], 8), jnp.float32)
    inputs = BackwardInputs(query, (run,), None, jnp.int32(0), dout, dout, lse)
    assert choice.fused_backward(spec, inputs) is None
