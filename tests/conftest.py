"""Eight CPU devices, the markers `slow`, `aot` and `gpu`, and the fixtures all test files share."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # before the first use of a device

# Every test that takes the fixture `implementation` runs once for each of these.
IMPLEMENTATIONS = ["xla"]


def pytest_configure(config):
    """Registers the markers."""
    config.addinivalue_line("markers", "slow: long sweeps; run them with `pytest -m slow -n 2`")
    config.addinivalue_line("markers", "aot: compiles for a GPU that is not here; run with -m aot")
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped where there is none")


def pytest_collection_modifyitems(config, items):
    """Skips `slow` and `aot` unless `-m` asks for them, and `gpu` where there is no GPU."""
    for item in items:
        for name in ("slow", "aot"):
            if name in item.keywords and name not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"{name}: run with -m {name}"))
        if "gpu" in item.keywords and jax.default_backend() != "gpu":
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
