"""The random calls of `test_gpu_random` in small, on CPU devices and in plain XLA."""

import random

import pytest

from tests.helpers.random_decoding import random_decoding_job
from tests.helpers.random_jobs import check, random_job

SMALL = dict(chunks=(2, 3, 5, 8, 9, 13), dims=((16, 16), (8, 4)))


@pytest.mark.parametrize(
    ("devices", "seed"),
    [
        pytest.param(devices, seed, marks=[] if (devices, seed) == (1, 0) else pytest.mark.slow)
        for devices in (1, 2, 4)
        for seed in range(4)
    ],
)
def test_equals_the_oracle_and_repeats_its_bits(devices, seed):
    check(random_job(random.Random(f"{devices}-{seed}"), devices, ("xla",), **SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_decoding_equals_the_oracle(seed):
    implementations, dims = ("xla", "triton"), ((16, 16), (16, 32))
    check(random_decoding_job(random.Random(seed), implementations, dims=dims))
