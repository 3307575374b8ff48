"""Compile gate: every kernel variant of the model table becomes sm_90a code without spills.

Deselected by default; `pytest -m aot` needs the packages that `tests/hopper.py` names.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests import hopper
from tests.models import MODELS, Model

pytestmark = pytest.mark.aot

KERNELS = {"ring_swa_forward", "ring_swa_backward_query", "ring_swa_backward_keys"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Forward and backward of a model's layer, `chunk` tokens on each of the devices."""

    model: Model
    devices: int = 1
    chunk: int = 8192
    dtype: str = "bfloat16"
    sinks: int = 0
    segments: bool = False
    implementation: str = "triton"

    def compile(self):
        """hopper.Program of the output and all gradients."""
        mesh, model = hopper.mesh(self.devices), self.model

        def shape(*dims, dtype=self.dtype, axes=(None, "seq")):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*axes)))

        length = self.chunk * self.devices
        (heads, kv_heads), (dim, value_dim) = model.heads, model.dims
        q, k, v, dout = (
            shape(1, length, *dims)
            for dims in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim))
        )
        sink = shape(heads, dtype=jnp.float32, axes=()) if model.learned else None
        ids = shape(1, length, dtype=jnp.int32) if self.segments else None

        def program(q, k, v, sink, ids, dout):
            def attend(q, k, v, sink):
                return rsj.ring_attention(
                    q, k, v, window_size=model.window, num_sink_tokens=self.sinks,
                    segment_ids=ids, sink_logits=sink, logits_soft_cap=model.softcap,
                    implementation=self.implementation,
                )  # fmt: skip

            out, pull = jax.vjp(attend, q, k, v, sink)
            return out, pull(dout)

        return hopper.compile_program(program, (q, k, v, sink, ids, dout), self.devices)


# Every kernel of the model table; the models left out differ in numbers of heads alone.
DISTINCT = ("mistral_7b", "phi3_mini", "gemma2_9b", "gemma3_4b", "gpt_oss", "mimo_v2_flash")
MISTRAL = MODELS["mistral_7b"]
SMALL = dataclasses.replace(MISTRAL, window=1000)

VARIANTS = {
    **{name: Variant(MODELS[name]) for name in (*DISTINCT, "mistral_7b_global")},
    **{f"{name}_ring": Variant(MODELS[name], devices=4) for name in DISTINCT},
    "mistral_7b_hops": Variant(MISTRAL, devices=4, chunk=2048),
    "sinks_segments": Variant(SMALL, sinks=4, segments=True),
    "sinks_segments_ring": Variant(SMALL, devices=4, sinks=4, segments=True),
    "float16": Variant(SMALL, dtype="float16"),
    "float32": Variant(SMALL, dtype="float32"),
}

# (dtype, H, kernel): (bytes that a thread may spill, why that is right).
SPILLS: dict[tuple[str, int, str], tuple[int, str]] = {}


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_for_hopper_without_spills(name):
    variant = VARIANTS[name]
    program = variant.compile()
    assert set(program.launches) == KERNELS
    assert {base_name(kernel) for kernel in program.kernels} == KERNELS
    if variant.devices > 1:
        assert "collective-permute-start" in program.hlo
        assert "all-gather" not in program.hlo or variant.segments
        for kernel in KERNELS:
            assert program.launches.count(kernel) >= 2, "one for the halo, one for the chunk"
    for kernel in program.kernels:
        print(f"{name}: {kernel.name} {kernel.registers} registers, {kernel.spills} B spilled")
    for kernel in program.kernels:
        key = (variant.dtype, variant.model.dims[0], base_name(kernel))
        allowed, _ = SPILLS.get(key, (0, ""))
        assert kernel.spills <= allowed, (name, kernel)


def base_name(kernel):
    """The kernel's name without the number that XLA gives to a second one of that name."""
    return next(name for name in KERNELS if kernel.name.startswith(name))
