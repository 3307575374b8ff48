"""Several processes under jax.distributed, on CPU devices."""

import time

import pytest

from tests.helpers.processes import CPU, free_port, outputs, start, succeed


def test_two_processes_equal_the_oracle():
    port = free_port()
    workers = [start("-m", "tests.helpers.process_worker", n, port, "cpu", **CPU) for n in range(2)]
    assert all("equal 2" in out for out in succeed(workers))


def test_processes_that_disagree_are_told():
    port = free_port()
    workers = [start("-m", "tests.helpers.disagreeing_worker", n, port, **CPU) for n in range(2)]
    assert all("told 11" in out for out in succeed(workers))


def start_training(folder, steps, devices, *several):
    """Compiling is most of the time."""
    environment = CPU | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = ("-m", "tests.helpers.training_worker", folder, steps, devices, *several)
    return start(*command, **environment)


def losses_of(folder):
    """The loss of each step, in order; the later one where a run went back to a checkpoint."""
    lines = [line.split() for line in (folder / "losses").read_text().splitlines()]
    return [loss for _, loss in sorted({int(step): float(loss) for step, loss in lines}.items())]


def steps_done(folder):
    losses = folder / "losses"
    return losses.read_text().count("\n") if losses.exists() else 0


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_goes_on_with_fewer_devices(tmp_path):
    """Not process 0, without which the others end at once: they have to miss a heartbeat."""
    folder, port = tmp_path / "run", free_port()
    folder.mkdir()
    workers = [start_training(folder, 10**6, 4, port, 4, n) for n in range(4)]
    while steps_done(folder) < 5:
        assert all(worker.poll() is None for worker in workers), outputs(workers)
        time.sleep(0.01)
    workers[2].kill()
    killed = time.monotonic()
    for n, (status, _, err) in enumerate(outputs(workers, timeout=60)):
        assert status != 0
        assert n == 2 or "JaxRuntimeError" in err or "another task died" in err, err[-3000:]
    assert time.monotonic() - killed < 60
    done = steps_done(folder)

    (tmp_path / "undisturbed").mkdir()
    succeed([start_training(folder, done + 2, 2)])
    succeed([start_training(tmp_path / "undisturbed", done + 2, 4)])
    losses, undisturbed = losses_of(folder), losses_of(tmp_path / "undisturbed")
    assert len(losses) == done + 2
    assert losses == pytest.approx(undisturbed, rel=1e-4)
