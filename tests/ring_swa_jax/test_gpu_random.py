"""Random calls on the GPUs that are here, beside the oracle, their kernels' outputs poisoned.

To compile a case takes up to a minute of a core, so run this in many processes
(`docs/contributing.md`). A failure ends with a line that runs the case again. Other cases:
``GPU_RANDOM_SEEDS=1000:1060``; more time: ``GPU_RANDOM_SECONDS=900``. Cases that are not reached in
time are skipped.
"""

import os
import random
import time

import pytest

from tests.helpers.poison import poisoned_outputs
from tests.helpers.pool import prepared, turn_on_gpus
from tests.helpers.random_decoding import random_decoding_job
from tests.helpers.random_jobs import DIMS, compare_and_repeat, random_job
from tests.helpers.refusals import must_refuse

pytestmark = pytest.mark.gpu

SEEDS = range(*map(int, os.environ.get("GPU_RANDOM_SEEDS", "0:60").split(":")))
SECONDS = float(os.environ.get("GPU_RANDOM_SECONDS", "300"))
IMPLEMENTATIONS = (
    "mosaic_gpu", "mosaic_gpu", "mosaic_gpu", "triton", "triton", "mosaic_gpu_nondeterministic",
    None,
)  # fmt: skip


def jobs():
    """Parameters: cases of one GPU, of two and of four, and steps of decoding, take turns."""
    for seed in SEEDS:
        for gpus in (1, 2, 4):
            job = random_job(random.Random(f"{gpus}-{seed}"), gpus, IMPLEMENTATIONS)
            yield pytest.param(job, id=f"{gpus}-{seed}")
        job = random_decoding_job(random.Random(seed), IMPLEMENTATIONS, dims=DIMS)
        yield pytest.param(job, id=f"decoding-{seed}")


@pytest.fixture(scope="module")
def programs(request):
    """(futures of the selected jobs' programs, when there is no more time)."""
    with poisoned_outputs(), prepared(request, threads=16) as futures:
        yield futures, time.monotonic() + SECONDS


@pytest.mark.parametrize("job", list(jobs()))
def test_equals_the_oracle_and_repeats_its_bits(job, programs):
    futures, end = programs
    if time.monotonic() > end:
        pytest.skip(f"not reached in {SECONDS:.0f} seconds")
    if job.implementation and must_refuse(job.implementation, job.case.dtype):
        pytest.skip(f"{job.implementation} is not for this GPU or jax")
    try:
        prepared_job = futures[job].result()
        with turn_on_gpus():
            compare_and_repeat(job, prepared_job)
    except Exception as error:
        error.add_note(f"tests.helpers.random_jobs.check({job})")  # runs it again
        raise
