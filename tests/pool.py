"""Prepares the selected tests' programs ahead, in threads: compiling is most of their time."""

import contextlib
from concurrent.futures import ThreadPoolExecutor


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
