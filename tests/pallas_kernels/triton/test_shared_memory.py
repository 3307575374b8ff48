"""The shared memory of each Triton kernel is what the compiler asks for, on every kind of GPU.

Deselected by default, as `test_compile.py`: `pytest -m aot`.
"""

import itertools

import jax.numpy as jnp
import pytest

from pallas_kernels import _device
from pallas_kernels._triton.blocks import head_parts
from pallas_kernels._triton.plans import Shapes, launch_bytes, triton_plan
from pallas_kernels._triton.shared_memory import BARRIERS
from tests.helpers import compile_target
from tests.helpers.triton_launches import Launch

pytestmark = pytest.mark.aot

# The smallest of each rule: an A100 and an RTX PRO 6000 have an L4's. An H100 has one of its own.
GPUS = ("l4", "b200")
OF_HOPPER = ("gpt_oss", "window_1023", "head_256", "float32_128")
OF_A100 = ("no_window", "float32_256")
SHAPES = {
    "gpt_oss": Shapes(jnp.dtype("bfloat16"), 64, 64, 127, 8, 2048),
    "head_96": Shapes(jnp.dtype("float16"), 96, 96, 1023, 2, 2048, num_sinks=4),
    "head_80": Shapes(jnp.dtype("bfloat16"), 80, 80, 1023, 1, 2048),
    "window_1023": Shapes(jnp.dtype("bfloat16"), 128, 128, 1023, 8, 2048, num_sinks=33),
    "no_window": Shapes(jnp.dtype("bfloat16"), 128, 128, None, 4, 2048),
    "short": Shapes(jnp.dtype("bfloat16"), 128, 128, None, 1, 32),
    "mimo_v2_flash": Shapes(jnp.dtype("bfloat16"), 192, 128, 127, 8, 2048, num_sinks=33),
    "head_256": Shapes(jnp.dtype("bfloat16"), 256, 256, 511, 2, 2048, num_sinks=33),
    "float32": Shapes(jnp.dtype("float32"), 64, 64, 500, 1, 2048, num_sinks=33),
    "float32_128": Shapes(jnp.dtype("float32"), 128, 128, 500, 1, 2048),
    "float32_256": Shapes(jnp.dtype("float32"), 256, 256, 511, 1, 2048, num_sinks=4),
}


def slack(launch):
    """Bytes by which the rule may say more than the compiler.

    2048 and the barriers for alignment and for starts, which only some loops read. Weights go
    through shared memory for some parts of a split head and not for others, or for one of two heads
    of different sizes; the rule counts them. IEEE float32 products run without matrix instructions,
    and hold some operands in registers alone.
    """
    shapes, tiles = launch.shapes, launch.tiles
    itemsize = shapes.dtype.itemsize
    parts = {size for dim in (shapes.head_dim, shapes.value_dim) for _, size in head_parts(dim)}
    allowed = 2048 + BARRIERS
    if len(parts) > 1:
        allowed += tiles.query * tiles.heads * tiles.key * itemsize
    if itemsize == 4:
        held = tiles.key if launch.kernel not in ("forward", "dquery") else tiles.query
        allowed += held * (shapes.head_dim + shapes.value_dim) * itemsize + 8192
    return allowed


def launches(shapes, gpu):
    """Each kernel of the plan for this GPU."""
    plan = triton_plan("triton", shapes, gpu)
    return [Launch(kernel, tiles, shapes) for kernel, tiles in plan.kernels().items()]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *itertools.product(SHAPES, GPUS),
        *((name, "h100") for name in OF_HOPPER),
        *((name, "a100") for name in OF_A100),
    ],
)
def test_plan_knows_its_shared_memory(name, target, record_property):
    gpu = _device.gpu_of_kind(compile_target.device_kind(target))
    for launch in launches(SHAPES[name], gpu):
        said = launch_bytes(launch.kernel, launch.tiles, launch.shapes, gpu.capability)
        asked = compile_target.shared_memory_request(launch.run, launch.arguments(), target)
        record_property("shared", [target, name, launch.kernel, asked, said, gpu.shared_memory])
        assert asked <= said <= asked + slack(launch), launch
        assert said <= gpu.shared_memory
