"""Prepares the selected tests' programs ahead, in threads: compiling is most of their time.

Threads share Python's lock, which tracing and lowering hold. So where there are many programs,
processes are faster (``pytest -n 12``); then each prepares a program when its test begins, and they
take turns on the GPUs.
"""

import contextlib
import fcntl
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from tests.helpers.routes import with_gradients


def compiled(function, arguments):
    """`function` with its gradients, compiled."""
    return compiled_program(with_gradients(function), arguments)


def compiled_program(program, arguments):
    """`program`, compiled quickly: XLA's products need no speed."""
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level" if on_cpu else "xla_gpu_autotune_level": 0}
    return jax.jit(program).lower(*arguments).compile(compiler_options=options)


@contextlib.contextmanager
def prepared(request, threads):
    """{job: future of job.prepare()} for the parameters `job` of the module's selected tests."""
    if _is_one_of_several():
        yield _OnDemand()
        return
    jobs = {}
    for item in request.session.items:
        if item.module is request.module and hasattr(item, "callspec"):
            jobs[item.callspec.params["job"]] = None
    with ThreadPoolExecutor(threads) as pool:
        yield {job: pool.submit(job.prepare) for job in jobs}
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def turn_on_gpus():
    """Holds the GPUs that JAX sees, while no other test process that sees the same ones does."""
    if not _is_one_of_several():
        yield
        return
    name = f"ring_swa_jax_tests_on_gpus_{os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}.lock"
    with Path(tempfile.gettempdir(), name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_one_of_several():
    return "PYTEST_XDIST_WORKER" in os.environ


class _OnDemand:
    """Looks like what `prepared` yields, without any work ahead."""

    def __getitem__(self, job):
        return _Now(job)


class _Now:
    """Looks like a future."""

    def __init__(self, job):
        self.job = job

    def result(self):
        return self.job.prepare()
