"""Eight CPU devices, the marker `gpu`, the compile gate's table, and fixtures that all share."""

import os
from collections import Counter

# Tests on GPUs may run in several processes.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jaxtyping
import pytest

from tests.helpers import typechecking

# Before the first import of either package: every function of theirs then checks at each call that
# its arguments and its result have the types and shapes of its signature.
jaxtyping.install_import_hook(
    ["ring_swa_jax", "pallas_kernels"], f"{typechecking.__name__}.checked"
)

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device

# Every test that takes the fixture `implementation` runs once for each of these.
IMPLEMENTATIONS = ["xla"]
NO_GPU = "needs a GPU; on a machine with one run `pytest -m gpu -n 0`"


def pytest_collection_modifyitems(items):
    """Skips `gpu` where there is no GPU."""
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter):
    """A line for each reason to skip tests, and what the compile gate found."""
    report_skipped(terminalreporter)
    report_compiled(terminalreporter)


def report_skipped(terminalreporter):
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
    )
    if reasons:
        terminalreporter.section("skipped tests")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} skipped: {reason}")


def report_compiled(terminalreporter):
    """What ptxas said of the kernels that `test_compile.py` compiled, also under xdist."""
    reports = [r for key in ("passed", "failed") for r in terminalreporter.getreports(key)]
    properties = [each for r in reports for each in r.user_properties]
    kernels = sorted(tuple(k) for key, value in properties if key == "kernels" for k in value)
    if not kernels:
        return
    terminalreporter.section(f"compiled kernels, jax {jax.__version__}")
    terminalreporter.line(f"{'variant':<36}{'kernel':<36}{'registers':>9}{'spilled':>11}")
    for variant, name, registers, spills in kernels:
        terminalreporter.line(f"{variant:<36}{name:<36}{registers:>9}{spills:>9} B")
    head = ("variant", "backend", "asked", "available", "spilled", "seconds")
    terminalreporter.section("shared memory of Triton's kernels, bytes of a block of threads")
    terminalreporter.line("{:<36}{:<9}{:>9}{:>11}{:>9}{:>9}".format(*head))
    for _, *row in sorted(value for key, value in properties if key == "gpu"):
        cells = ["-" if cell is None else cell for cell in row]
        terminalreporter.line("{:<36}{:<9}{:>9}{:>11}{:>9}{:>9}".format(*cells))


@pytest.fixture
def unchecked_signatures():
    """Lets arguments that break a signature reach the packages' own checks and their messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Name of the implementation under test."""
    return request.param


@pytest.fixture(params=[True, False], ids=["vma", "novma"])
def check_vma(request, implementation):
    """Both modes of jax.shard_map; the interpreter of Pallas-Triton on CPU knows only False."""
    if request.param and implementation == "triton" and jax.default_backend() == "cpu":
        pytest.skip("JAX's interpret mode needs check_vma=False")
    return request.param
