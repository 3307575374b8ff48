"""Eight CPU devices, the marker `gpu`, and the fixtures that all test files share."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device

# Every test that takes the fixture `implementation` runs once for each of these.
IMPLEMENTATIONS = ["xla"]


def pytest_collection_modifyitems(items):
    """Skips `gpu` where there is no GPU."""
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


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
