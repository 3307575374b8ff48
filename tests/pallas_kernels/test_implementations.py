"""Which implementation is chosen, what its refusals say, and what counts as not available."""

import contextlib
import importlib
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import Spec, _implementations, choose

GPU = ("triton", "mosaic_gpu", "mosaic_gpu_nondeterministic")
MOSAIC = GPU[1:]
HAS_MOSAIC = jax.__version_info__ >= (0, 11)
SPEC = Spec(window=3, num_sinks=0, scale=1.0, soft_cap=None, precision=None)
KINDS = {
    "hopper": ("NVIDIA H100 80GB HBM3", "cuda"),
    "ampere": ("NVIDIA A100-SXM4-80GB", "cuda"),
    "turing": ("Tesla T4", "cuda"),
    "tpu": ("TPU v5 lite", "tpu"),
}


def compiling_for(name):
    """Context in which the device compiled for is one that is not here; "cpu" is this one."""
    if name == "cpu":
        return contextlib.nullcontext()
    kind, platform = KINDS[name]
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def inputs(length=16, dim=64, value_dim=64, dtype="bfloat16"):
    """Queries and values."""
    return jnp.zeros((1, length, 2, dim), dtype), jnp.zeros((1, length, 1, value_dim), dtype)


# (device, arguments of `inputs`, who refuses, what the message shows)
REFUSALS = {
    "head_dim": ("hopper", dict(dim=272), GPU, ("272", "q and k")),
    "value_dim": ("hopper", dict(value_dim=24), GPU, ("24", "v")),
    "float64": ("hopper", dict(dtype="float64"), GPU, ("q of float64",)),
    "float32": ("hopper", dict(dtype="float32"), MOSAIC, ("q of float32",)),
    "cpu": ("cpu", {}, MOSAIC, ("'cpu'",)),
    "tpu": ("tpu", {}, GPU, ("'tpu'",)),
    "ampere": ("ampere", {}, MOSAIC, ("compute capability 9.0",)),
    "turing": ("turing", {}, GPU, ("compute capability", "7.5")),
}


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(case, name) for case, (_, _, names, _) in REFUSALS.items() for name in names],
)
def test_a_refusal_names_the_implementation_that_was_asked_for(case, implementation):
    device, arguments, _, shown = REFUSALS[case]
    if implementation in MOSAIC and not HAS_MOSAIC:
        shown = ("jax 0.11", jax.__version__)
    with jax.enable_x64(case == "float64"), compiling_for(device):
        query, value = inputs(**arguments)
        with pytest.raises(NotImplementedError) as caught:
            choose(implementation, SPEC, query, value)
        assert choose(None, SPEC, query, value) != implementation
    message = str(caught.value)
    assert f"implementation={implementation!r}" in message
    assert all(text in message for text in shown), message
    others = set(_implementations.NAMES) - {implementation}
    assert not any(repr(name) in message for name in others), message


@pytest.mark.parametrize(
    ("device", "arguments", "best"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "xla"),
        ("ampere", {}, "triton"),
        ("hopper", {}, "mosaic_gpu" if HAS_MOSAIC else "triton"),
        ("hopper", dict(dtype="float32"), "triton"),
        ("hopper", dict(length=13), "mosaic_gpu" if HAS_MOSAIC else "triton"),
        ("hopper", dict(dim=272), "xla"),
    ],
)
def test_none_takes_the_best_that_can(device, arguments, best):
    with compiling_for(device):
        assert choose(None, SPEC, *inputs(**arguments)) == best


@pytest.fixture
def uncached():
    """Imports of backends are tried anew in the test, and after it."""
    _implementations._imported.cache_clear()
    yield
    _implementations._imported.cache_clear()


def fail_to_import(monkeypatch, module, error):
    """Lets the import of a module of ours raise this error."""
    found = importlib.import_module

    def import_module(name):
        if name == module:
            raise error
        return found(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


MISSING = [
    ImportError("cannot import name 'f' from 'jax.lax'", name="jax.lax"),
    ModuleNotFoundError("No module named 'jaxlib.g'", name="jaxlib.g"),
    AttributeError("module 'jax' has no attribute 'h'", name="h", obj=jax),
]
OURS = [
    ImportError("cannot import name 'f' from 'pallas_kernels'", name="pallas_kernels"),
    AttributeError("'Spec' object has no attribute 'h'", name="h", obj=SPEC),
    ZeroDivisionError("a fault"),
]
BACKENDS = [
    ("triton", "ampere", "pallas_kernels._triton.kernels", "xla"),
    pytest.param(
        "mosaic_gpu", "hopper", "pallas_kernels._mosaic_gpu.kernels", "triton",
        marks=pytest.mark.skipif(not HAS_MOSAIC, reason="this jax has no Mosaic GPU of ours"),
    ),
]  # fmt: skip


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("error", MISSING, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("implementation", "device", "module", "next_one"), BACKENDS)
def test_a_name_that_jax_lacks(monkeypatch, implementation, device, module, next_one, error):
    fail_to_import(monkeypatch, module, error)
    with compiling_for(device), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with pytest.raises(NotImplementedError) as refused:
                choose(implementation, SPEC, *inputs())
            assert choose(None, SPEC, *inputs()) == next_one
    for shown in (f"implementation={implementation!r}", jax.__version__, str(error)):
        assert shown in str(refused.value)
    (warning,) = (w for w in caught if issubclass(w.category, RuntimeWarning))
    assert str(warning.message) == str(refused.value)


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("implementation", "device", "module", "next_one"), BACKENDS)
def test_a_fault_of_ours_is_raised(monkeypatch, implementation, device, module, next_one, error):
    fail_to_import(monkeypatch, module, error)
    for name in (implementation, None):
        with compiling_for(device), pytest.raises(type(error)) as caught:
            choose(name, SPEC, *inputs())
        assert caught.value is error


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("name", _implementations.NAMES if HAS_MOSAIC else ("xla", "triton"))
def test_this_jax_has_every_name_that_the_backends_import(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        kernels = _implementations._imported(name)
    assert kernels.name == name


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("from jax.lax import nothing", True),
        ("import jax.experimental.nothing", True),
        ("import jaxlib.nothing", True),
        ("import jax; jax.lax.nothing", True),
        ("import jax; jax.sharding.AbstractMesh.nothing", True),
        ("from pallas_kernels._spec import nothing", False),
        ("import pallas_kernels.nothing", False),
        ("import pallas_kernels; pallas_kernels.Spec.nothing", False),
        ("import jaxtyping.nothing", False),  # its name only begins like jax's
        ("import numpy; numpy.nothing", False),
        ("(1).nothing", False),
    ],
)
def test_what_is_about_jax(statement, expected):
    with pytest.raises((ImportError, AttributeError)) as caught:
        exec(statement, {})
    assert _implementations.is_about_jax(caught.value) == expected
