"""The kernels on the GPU that is here, their outputs poisoned with NaN before they run.

Every case is compared with the oracle, output and gradients, and repeated: an element that is
never written is NaN, and the same inputs must give the same bits. Rings need two GPUs; one GPU
runs the last chunk of a ring of equal chunks.
"""

import contextlib
import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._mosaic_gpu.backward import choice
from tests.helpers import repeated_ring
from tests.helpers.cases import Case
from tests.helpers.gpu_cases import (
    CHUNKS,
    LONG,
    edge_case,
    for_fused,
    in_half_precision,
    odd_cases,
    to_both_sides,
)
from tests.helpers.oracle import Result
from tests.helpers.poison import poisoned_outputs
from tests.helpers.pool import compiled, prepared
from tests.helpers.refusals import result_unless_refused
from tests.helpers.routes import ROUTES, compare, documents_of, route_of

pytestmark = pytest.mark.gpu
KERNELS = ("triton", "mosaic_gpu")
NONDETERMINISTIC = "mosaic_gpu_nondeterministic"


@dataclasses.dataclass(frozen=True)
class Job:
    """A case by a route on an implementation."""

    case: Case
    route: str
    implementation: str

    def prepare(self):
        """(compiled program, its arguments, the oracle's Result)."""
        function, mesh = ROUTES[self.route](self.case, self.implementation)
        inputs, dout = self.case.arrays()
        arguments = (*inputs, documents_of(self.case), dout)
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            return compiled(function, arguments), arguments, self.case.expected


@dataclasses.dataclass(frozen=True)
class LastChunk:
    """A case's last chunk in a ring of equal chunks, which one GPU can play."""

    case: Case
    implementation: str

    def prepare(self):
        """(compiled program, its arguments, the oracle's Result)."""
        inputs, dout = repeated_ring.arrays(self.case)
        arguments = (*inputs, None, dout)
        program = compiled(repeated_ring.last_chunk(self.case, self.implementation), arguments)
        return program, arguments, repeated_ring.expected(self.case)


def local_job(case, implementation):
    """On one device, by the route for its kind of documents."""
    whole = case.packed or case.documents is None
    return Job(case, "one_device" if whole else "global_local", implementation)


def jobs():
    """Parameters: odd and random cases on the kernels, some odd ones on "xla", parts of rings."""
    for implementation in (*KERNELS, "xla"):
        for n, (name, case) in enumerate(odd_cases().items()):
            if implementation == "xla" and n % 3:
                continue
            if implementation == "mosaic_gpu" and name.endswith("-float32"):
                continue  # in half precision it is the next case
            taken_case = taken(case, implementation, fused=not case.sinks)
            job = local_job(taken_case, implementation)
            yield pytest.param(job, id=f"{name}-{implementation}")
    for implementation in (*KERNELS, NONDETERMINISTIC):

        def case(seed, devices=1, implementation=implementation):
            return taken(edge_case(random.Random(seed), devices), implementation, fused=seed % 2)

        for seed in range(1, 9, 2) if implementation == NONDETERMINISTIC else range(28):
            yield pytest.param(
                local_job(case(seed), implementation), id=f"random-{seed}-{implementation}"
            )
        for seed in range(12):
            job = local_job(to_both_sides(case(seed)), implementation)
            yield pytest.param(job, id=f"both-sides-{seed}-{implementation}")
        if implementation != "triton":
            for name, long_case in LONG.items():
                job = local_job(long_case, implementation)
                yield pytest.param(job, id=f"{name}-{implementation}")
        if implementation == NONDETERMINISTIC:
            continue
        for seed in range(16):
            job = LastChunk(case(seed, 2 + seed % 2), implementation)
            yield pytest.param(job, id=f"chunk-{seed}-{implementation}")
        if implementation == "mosaic_gpu":
            for name, chunk in CHUNKS.items():
                job = LastChunk(chunk, implementation)
                yield pytest.param(job, id=f"chunk-{name}-{implementation}")
        for seed in range(16):
            rings = {"ring": case(seed, 2), "ring-both-sides": to_both_sides(case(seed, 2))}
            for name, ring in rings.items():
                job = Job(ring, route_of(ring), implementation)
                yield pytest.param(job, id=f"{name}-{seed}-{implementation}")


def taken(case, implementation, fused):
    """The case as the implementation takes it, and if ``fused`` its fused backward kernel too."""
    if implementation not in ("mosaic_gpu", NONDETERMINISTIC):
        return case
    return in_half_precision(for_fused(case) if fused else case)


@pytest.fixture(scope="module")
def programs(request):
    """Futures of the selected jobs' programs, traced with poisoned outputs.

    The fused Mosaic backward kernel computes all that it can, not only what it is fastest at.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "fuses_backward", lambda *_, **__: True)
        with poisoned_outputs(), prepared(request, threads=16) as futures:
            yield futures


@pytest.mark.parametrize("job", list(jobs()))
def test_writes_every_element_right_and_repeats_its_bits(job, programs):
    prepared_job = result_unless_refused(programs[job], job.implementation, job.case.dtype)
    if prepared_job is None:
        return
    program, arguments, expected = prepared_job
    result = Result(*jax.device_get(tuple(program(*arguments))))
    compare(result, expected, job.case.dtype, job)
    if job.implementation == NONDETERMINISTIC:
        return
    for name, a, b in zip(Result._fields, result, program(*arguments), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), f"{name} differs\n{job}"


def test_poison_shows_what_a_kernel_leaves_out():
    def write_half(x_ref, out_ref):
        out_ref[:16] = x_ref[:16]

    x = jnp.ones(32)
    with poisoned_outputs():
        out = pl.pallas_call(
            write_half,
            in_specs=[pl.BlockSpec((32,), lambda: (0,))],
            out_specs=pl.BlockSpec((32,), lambda: (0,)),
            out_shape=jax.ShapeDtypeStruct((32,), jnp.float32),
            compiler_params=plgpu.CompilerParams(num_warps=1),
        )(x)
    assert np.isfinite(out[:16]).all() and np.isnan(out[16:]).all()
