"""What is known of GPUs, those that are not here by their names, and which backend they get."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import _device, _implementations
from pallas_kernels._device import Gpu
from pallas_kernels._spec import Spec
from pallas_kernels._triton.kernels import TritonKernels
from pallas_kernels._triton.plans import Shapes, launch_bytes, triton_plan
from tests.helpers import compile_target

NAMES = {
    "NVIDIA A100-SXM4-40GB": 8.0,
    "NVIDIA A100 80GB PCIe": 8.0,
    "NVIDIA A30": 8.0,
    "NVIDIA A800-SXM4-80GB": 8.0,
    "NVIDIA A10": 8.6,
    "NVIDIA A10G": 8.6,
    "NVIDIA A2": 8.6,
    "NVIDIA RTX A6000": 8.6,
    "NVIDIA GeForce RTX 3090 Ti": 8.6,
    "NVIDIA GeForce RTX 3080 Laptop GPU": 8.6,
    "NVIDIA Jetson AGX Orin": 8.7,
    "NVIDIA L4": 8.9,
    "NVIDIA L40S": 8.9,
    "NVIDIA GeForce RTX 4090": 8.9,
    "NVIDIA RTX 6000 Ada Generation": 8.9,
    "NVIDIA RTX 5000 Ada Generation": 8.9,
    "NVIDIA H100 80GB HBM3": 9.0,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": 9.0,
    "NVIDIA H100 PCIe": 9.0,
    "NVIDIA H200": 9.0,
    "NVIDIA GH200 480GB": 9.0,
    "NVIDIA H20": 9.0,
    "NVIDIA H800": 9.0,
    "NVIDIA B200": 10.0,
    "NVIDIA GB200": 10.0,
    "NVIDIA B300 SXM6 AC": 10.3,
    "NVIDIA GB300": 10.3,
    "NVIDIA GB10": 12.1,
    "NVIDIA GeForce RTX 5090": 12.0,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 12.0,
    "NVIDIA RTX PRO 5000 Blackwell": 12.0,
    "Tesla T4": 7.5,
    "NVIDIA T4": 7.5,
    "Quadro RTX 5000": 7.5,
    "NVIDIA GeForce RTX 2080 Ti": 7.5,
    "Tesla V100-SXM2-16GB": 7.0,
    "Tesla P100-PCIE-16GB": 6.0,
}
MODERN = [name for name, capability in NAMES.items() if capability >= 8]


def compiled_for(kind):
    """A mesh of one GPU of this name that is not here."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    mesh = AbstractMesh((1,), ("seq",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("name", NAMES)
def test_capability_by_name(name):
    assert _device.gpu_of_kind(name).capability == NAMES[name]


@pytest.mark.parametrize("target", compile_target.TARGETS)
def test_table_says_what_the_compiler_is_told(target):
    text = compile_target.target_text(target)
    gpu = _device.gpu_of_kind(compile_target.device_kind(target))
    major = re.search(r"major: (\d+)", text.partition("cuda_compute_capability")[2])[1]
    assert int(gpu.capability) == int(major)
    assert f"shared_memory_per_block_optin: {gpu.shared_memory} " in text


def test_unknown_gpus_get_the_least():
    assert _device.gpu_of_kind("NVIDIA R200") == _device.UNKNOWN
    assert _device.gpu_of_device(13.0, None).shared_memory == 99 * 1024
    assert _device.gpu_of_device(13.0, 300000) == Gpu(13.0, 300000)
    assert _device.gpu_of_kind("AMD Instinct MI300X").capability == 0


@pytest.mark.slow
def test_every_input_has_a_plan_on_every_gpu_that_runs_triton():
    """So None takes Triton there, and Mosaic never refuses for a fallback that it may not need."""
    gpus = {_device.gpu_of_kind(name) for name in MODERN} | {_device.UNKNOWN}
    for gpu in gpus:
        for dtype, dims in (("bfloat16", range(16, 257, 48)), ("float32", (64, 128, 144, 256))):
            for dim in dims:
                for value_dim in (dim, 16, 256):
                    for window in (100, 1000, None):
                        shapes = Shapes(jnp.dtype(dtype), dim, value_dim, window, 8, 4096, 70)
                        plan = triton_plan("triton", shapes, gpu)
                        for kernel, tiles in plan.kernels().items():
                            asked = launch_bytes(kernel, tiles, shapes, gpu.capability)
                            assert asked <= gpu.shared_memory, (gpu, shapes, kernel)


def test_hopper_takes_the_plans_that_won_there():
    """The first candidates all fit an H100, but for sinks beyond them."""
    hopper = _device.gpu_of_kind("NVIDIA H100 80GB HBM3")
    for dtype, dims in (("bfloat16", (64, 96, 128, 192, 256)), ("float32", (64, 128, 256))):
        for dim in dims:
            shapes = Shapes(jnp.dtype(dtype), dim, dim, None, 4, 8192)
            assert triton_plan("triton", shapes, hopper) == triton_plan("triton", shapes, None)


def test_refusal_says_the_numbers(monkeypatch):
    monkeypatch.setattr(_device, "compiled_platform", lambda: "gpu")
    monkeypatch.setattr("pallas_kernels._support.compiled_platform", lambda: "gpu")
    for module in (_device, "pallas_kernels._support"):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.compiled_gpu", lambda: Gpu(8.0, 40000))
    spec = Spec(1023, 4, 1.0, None, "highest")
    query, value = (jnp.zeros((1, 512, n, 128), jnp.bfloat16) for n in (8, 2))
    with pytest.raises(NotImplementedError) as caught:
        TritonKernels("asked").check(spec, query, value)
    assert str(caught.value) == (
        "implementation='asked' needs 57600 bytes of shared memory for the kernel of forward, "
        "this GPU has 40000: head dims 128 of q and k, 128 of v, dtype bfloat16, num_sink_tokens=4"
    )
    assert _implementations.choose(None, spec, query, value) == "xla"


@pytest.mark.parametrize(
    ("target", "dtype", "best"),
    [
        ("t4", "float16", "xla"),
        ("a100", "bfloat16", "triton"),
        ("rtx_pro_6000", "bfloat16", "triton"),
        ("h100", "float32", "triton"),
    ],
)
def test_best_backend_of_an_absent_gpu(target, dtype, best):
    query = jnp.zeros((1, 512, 4, 256), dtype)
    with compiled_for(compile_target.device_kind(target)):
        spec = Spec(None, 0, 1.0, None, "highest")
        assert _implementations.choose(None, spec, query, query) == best


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("NVIDIA H20", 78),
        ("NVIDIA H100 PCIe", 114),
        ("NVIDIA H800 PCIe", 114),
        ("NVIDIA H100 80GB HBM3", 132),
        ("NVIDIA H200 NVL", 132),
        ("NVIDIA GH200 480GB", 132),
    ],
)
def test_multiprocessors_of_an_absent_hopper(kind, count):
    with compiled_for(kind):
        assert _device.multiprocessors() == count


@pytest.mark.parametrize("kind", NAMES)
def test_half_precision_of_an_absent_gpu(kind):
    with compiled_for(kind):
        expected = "bfloat16" if NAMES[kind] >= 8 else "float16"
        assert _device.half_precision_dtype().name == expected


def test_half_precision_here():
    assert _device.half_precision_dtype() == jnp.bfloat16
