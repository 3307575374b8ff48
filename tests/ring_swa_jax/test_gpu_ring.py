"""Two GPUs and more against one: every public function, meshes of two axes, a process a GPU.

The same sequence on one GPU is the reference, in the same dtype and implementation; `test_gpu.py`
compares that with the oracle.
"""

import contextlib
import dataclasses
import re

import jax
import numpy as np
import pytest

from tests.helpers.cases import Case
from tests.helpers.oracle import Result
from tests.helpers.pool import compiled, prepared, turn_on_gpus
from tests.helpers.processes import GPU, free_port, start, succeed
from tests.helpers.refusals import result_unless_refused
from tests.helpers.routes import ROUTES, compare, documents_of, over_mesh, route_of
from tests.helpers.train_lm import SETTINGS, losses

pytestmark = pytest.mark.gpu
KERNELS = ("triton", "mosaic_gpu")

LAYER = Case(1024, 2, 300, batch=2, heads=(8, 2), dims=(64, 64))
PACKED = ((300, 1100, 0, 600, -48),)
ROWS = ((300, 1100, -24, 624), (1025, 1023))
CASES = {
    "sliding": LAYER,
    "sliding_short": dataclasses.replace(LAYER, window=127),
    "sliding_long_halo": dataclasses.replace(LAYER, window=900),
    "sliding_fused": dataclasses.replace(LAYER, dims=(128, 128)),
    "sliding_learned_capped": dataclasses.replace(LAYER, learned=True, softcap=20.0),
    "full_causal": dataclasses.replace(LAYER, window=None),
    "streaming": dataclasses.replace(LAYER, sinks=4),
    "sliding_varlen": dataclasses.replace(LAYER, documents=PACKED, packed=True, batch=1),
    "streaming_varlen": dataclasses.replace(LAYER, documents=PACKED, packed=True, batch=1, sinks=4),
    "segments": dataclasses.replace(LAYER, documents=ROWS, sinks=4, learned=True),
}
MESHES = [
    dict(data=2, seq=1), dict(data=1, seq=2), dict(data=2, seq=2),
    dict(seq=1, model=2), dict(seq=2, model=1), dict(seq=2, model=2),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BesideOneGpu:
    """A case over a mesh and on one GPU; `axes` is the mesh of ring_attention, () a plain ring."""

    case: Case
    implementation: str
    route: str | None = None
    axes: tuple[tuple[str, int], ...] = ()

    def prepare(self):
        """(program over the mesh, the one on one GPU, their arguments)."""
        whole = self.case.packed or self.case.documents is None
        if self.route is None:
            sizes, names = dict(self.axes), dict(data="batch_axis", model="head_axis")
            build = over_mesh(sizes=sizes, **{names[n]: n for n in sizes if n in names})
        else:
            build = ROUTES[self.route]
        inputs, dout = self.case.arrays()
        arguments = (*inputs, documents_of(self.case), dout)
        programs = []
        for route in (build, ROUTES["one_device" if whole else "global_local"]):
            function, mesh = route(self.case, self.implementation)
            with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                programs.append(compiled(function, arguments))
        return *programs, arguments


def jobs():
    """Parameters."""
    for implementation in KERNELS:
        for dtype in ("float32", "bfloat16"):
            for name, case in CASES.items():
                case = dataclasses.replace(case, dtype=dtype)
                routes = {route_of(case)} if case.documents else {"shard", "global"}
                for route in sorted(routes):
                    job = BesideOneGpu(case, implementation, route)
                    yield pytest.param(job, id=f"{name}-{route}-{dtype}-{implementation}")
            case = dataclasses.replace(CASES["segments"], dtype=dtype)
            for axes in MESHES:
                job = BesideOneGpu(case, implementation, axes=tuple(axes.items()))
                name = "_".join(f"{axis}{size}" for axis, size in axes.items())
                yield pytest.param(job, id=f"{name}-{dtype}-{implementation}")


@pytest.fixture(scope="module")
def programs(request):
    """Futures of the selected jobs' programs."""
    with prepared(request, threads=24) as futures:
        yield futures


@pytest.mark.parametrize("job", list(jobs()))
def test_gpus_equal_one(job, programs):
    prepared_job = result_unless_refused(programs[job], job.implementation, job.case.dtype)
    if prepared_job is None:
        return
    ring, alone, arguments = prepared_job
    with turn_on_gpus():
        expected, result = jax.device_get((tuple(alone(*arguments)), tuple(ring(*arguments))))
    expected = [None if x is None else x.astype(np.float64) for x in expected]
    compare(Result(*result), Result(*expected), job.case.dtype, job)


@pytest.fixture
def two_gpus():
    """Skips without two GPUs."""
    if len(jax.devices()) < 2:
        pytest.skip("needs 2 GPUs")


@pytest.mark.usefixtures("two_gpus")
def test_a_process_a_gpu_equals_the_oracle():
    port = free_port()
    workers = [start("-m", "tests.helpers.process_worker", n, port, "gpu", **GPU) for n in range(2)]
    assert all("equal 2" in out for out in succeed(workers))


@pytest.mark.usefixtures("two_gpus")
def test_example_in_one_process_and_in_a_process_a_gpu(tmp_path):
    command = ["examples/train_lm.py", *SETTINGS, "--devices=2"]
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2"]
    workers = [start(*command, f"--folder={tmp_path}/together", CUDA_VISIBLE_DEVICES="0,1", **GPU)]
    for n in range(2):
        own = [f"--process-id={n}", f"--folder={tmp_path}/apart"]
        workers.append(start(*command, *flags, *own, CUDA_VISIBLE_DEVICES=str(n), **GPU))
    together, first, second = succeed(workers)
    assert losses(first) == pytest.approx(losses(together), rel=1e-4)
    ring, alone = re.search(r"first loss: (\S+) on 2 devices, (\S+) on one", first).groups()
    assert float(ring) == pytest.approx(float(alone), rel=1e-4)
    assert "loss" not in second, "only the first process prints"
