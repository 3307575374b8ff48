"""Two processes under jax.distributed, four CPU devices in all."""

from tests.helpers.processes import CPU, free_port, start, succeed


def test_two_processes_equal_the_oracle():
    port = free_port()
    workers = [start("-m", "tests.helpers.process_worker", n, port, "cpu", **CPU) for n in range(2)]
    assert all("equal 2" in out for out in succeed(workers))


def test_processes_that_disagree_are_told():
    port = free_port()
    workers = [start("-m", "tests.helpers.disagreeing_worker", n, port, **CPU) for n in range(2)]
    assert all("told 10" in out for out in succeed(workers))
