"""Random rings that one device plays, their Mosaic GPU kernels in the simulator."""

import random

import pytest

from tests.helpers.random_jobs import random_job
from tests.helpers.routes import compare
from tests.helpers.simulator import launches, simulated

SIZES = dict(
    chunks=(40, 57, 66, 72, 100),
    dims=((32, 32), (32, 32), (64, 64), (64, 32), (128, 64), (192, 64)),
)
SEEDS = (13, 31, 44, 109)
"""Small rings of which no launch is left to Triton's kernels."""


@pytest.mark.slow
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("seed", SEEDS)
def test_played_ring(seed):
    job = random_job(random.Random(seed), 1, ("mosaic_gpu",), **SIZES)
    assert job.played
    program, _ = job.program()
    with simulated():
        result = program(*job.arguments())
        assert "ring_swa_forward" in launches
    compare(result, job.case.expected, job.case.dtype, job)
