"""Layers without a window over two and over four GPUs beside one GPU, by each exchange."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.cases import Case
from tests.helpers.exchanges import per_shard, whole_arrays
from tests.helpers.oracle import Result
from tests.helpers.pool import compiled, prepared, turn_on_gpus
from tests.helpers.refusals import result_unless_refused
from tests.helpers.routes import ROUTES, compare, documents_of

pytestmark = pytest.mark.gpu

HALF = dict(dtype="bfloat16")
ROWS = ((300, 500, -24, 200), (1000, 24))
CASES = {
    "plain": Case(512, 4, None, heads=(8, 4), dims=(128, 128), **HALF),
    "learned": Case(256, 4, None, batch=2, heads=(8, 2), dims=(64, 64), learned=True, **HALF),
    "wide": Case(256, 4, None, heads=(4, 2), dims=(256, 256), **HALF),
    "documents": Case(256, 4, None, documents=ROWS, batch=2, heads=(4, 2), dims=(128, 128), **HALF),
    "packed": Case(
        256, 4, None, documents=((300, 500, 0, 200, -24),), packed=True, heads=(4, 1), **HALF
    ),
    "two_devices": Case(512, 2, None, heads=(6, 3), dims=(128, 128), softcap=20.0, **HALF),
}


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """A case by an exchange."""

    case: Case
    exchange: str
    layout: str
    implementation: str

    def prepare(self):
        """(program of several GPUs, the one of one GPU, their arguments)."""
        whole = self.case.packed or self.case.documents is None
        route = whole_arrays(self.exchange, self.layout)
        if whole and self.layout == "contiguous":
            route = per_shard(self.exchange)
        inputs, dout = self.case.arrays()
        arguments = (*inputs, documents_of(self.case), dout)
        programs = []
        for build in (route, ROUTES["one_device" if whole else "global_local"]):
            function, mesh = build(self.case, self.implementation)
            with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                programs.append(compiled(function, arguments))
        return *programs, arguments


def jobs():
    """Parameters."""
    for implementation in ("mosaic_gpu", "triton"):
        for exchange in ("all_to_all", "ring"):
            for name, case in CASES.items():
                for layout in ("contiguous", "dual_chunk"):
                    if case.packed and layout == "dual_chunk":
                        continue
                    job = Exchanged(case, exchange, layout, implementation)
                    yield pytest.param(job, id=f"{name}-{exchange}-{layout}-{implementation}")


@pytest.fixture(scope="module")
def programs(request):
    """Futures of the selected jobs' programs."""
    with prepared(request, threads=24) as futures:
        yield futures


@pytest.mark.parametrize("job", list(jobs()))
def test_gpus_equal_one_and_repeat_their_bits(job, programs):
    if len(jax.devices()) < job.case.devices:
        pytest.skip(f"needs {job.case.devices} GPUs")
    prepared_job = result_unless_refused(programs[job], job.implementation, job.case.dtype)
    if prepared_job is None:
        return
    several, alone, arguments = prepared_job
    with turn_on_gpus():
        first, second = (jax.device_get(tuple(several(*arguments))) for _ in range(2))
        expected = jax.device_get(tuple(alone(*arguments)))
    assert all(
        (a is None and b is None) or np.array_equal(a, b)
        for a, b in zip(first, second, strict=True)
    )
    expected = [None if x is None else x.astype(np.float64) for x in expected]
    compare(Result(*first), Result(*expected), job.case.dtype, job)
