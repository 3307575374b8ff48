"""Random rings that one device plays, their Mosaic GPU kernels in the simulator."""

import random

import pytest

from tests.helpers.random_jobs import random_job
from tests.helpers.routes import compare
from tests.helpers.simulator import launches, simulated

CHUNKS = (40, 57, 66, 72, 100)
DIMS = ((32, 32), (32, 32), (64, 64), (64, 32), (128, 64), (192, 64))


def jobs(count):
    """Rings of small heads; other jobs are those of `tests.ring_swa_jax.test_random_jobs`."""
    seed = 0
    while count:
        job = random_job(random.Random(seed), 1, ("mosaic_gpu",), chunks=CHUNKS, dims=DIMS)
        if job.played and job.case.length <= 200 and job.case.heads[0] <= 2:
            yield pytest.param(job, id=f"seed-{seed}")
            count -= 1
        seed += 1


@pytest.mark.slow
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("job", jobs(8))
def test_played_ring(job):
    program, _ = job.program()
    with simulated():
        result = program(*job.arguments())
        assert "ring_swa_forward" in launches
    compare(result, job.case.expected, job.case.dtype, job)
