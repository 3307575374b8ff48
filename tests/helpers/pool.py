"""Prepares the selected tests' programs ahead, in threads: compiling is most of their time."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

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
    jobs = {}
    for item in request.session.items:
        if item.module is request.module and hasattr(item, "callspec"):
            jobs[item.callspec.params["job"]] = None
    with ThreadPoolExecutor(threads) as pool:
        yield {job: pool.submit(job.prepare) for job in jobs}
        pool.shutdown(cancel_futures=True)
