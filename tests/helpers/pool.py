"""Prepares the selected tests' programs ahead, in threads: compiling is most of their time."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import jax

from tests.helpers.routes import with_gradients


def compiled(function, arguments):
    """`function` with its gradients, compiled without autotuning: XLA's products need no speed."""
    program = jax.jit(with_gradients(function)).lower(*arguments)
    return program.compile(compiler_options={"xla_gpu_autotune_level": 0})


@contextlib.contextmanager
def prepared(request, threads):
    """{job: future of job.prepare()} for the parameters `job` of the module's selected tests."""
    jobs = {}
    for item in request.session.items:
        if item.module is request.module and hasattr(item, "callspec"):
            jobs[item.callspec.params["job"]] = None
    with ThreadPoolExecutor(threads) as pool:
        yield {job: pool.submit(job.prepare) for job in jobs}
        pool.shutdown(cancel_futures=True)
