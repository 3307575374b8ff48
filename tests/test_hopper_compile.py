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

FORWARD, QUERY, KEYS = "ring_swa_forward", "ring_swa_backward_query", "ring_swa_backward_keys"
SINKS, FUSED = "ring_swa_backward_sinks", "ring_swa_backward_fused"
FINISH, SHORT = "ring_swa_backward_finish", "ring_swa_backward_short"
KERNELS = {FORWARD, QUERY, KEYS, SINKS, FUSED, FINISH, SHORT}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Forward and backward of a model's layer, `chunk` tokens on each of the devices."""

    model: Model
    devices: int = 1
    chunk: int = 8192
    dtype: str = "bfloat16"
    sinks: int = 0
    segments: bool = False
    implementation: str | None = "triton"

    def kernels(self):
        """The names of those that compute it."""
        if self.implementation != "triton" and self.is_short():
            return {FORWARD, SHORT, QUERY, KEYS} if self.devices > 1 else {FORWARD, SHORT}
        if self.implementation != "triton":
            # Who finishes the gradients of queries of a chunk; those of hops are float32.
            own = {SINKS} if self.sinks else set() if self.rounds_within() else {FINISH}
            return {FORWARD, FUSED} | own | ({FINISH} if self.hops() > 1 else set())
        return {FORWARD, QUERY, KEYS, SINKS} if self.sinks else {FORWARD, QUERY, KEYS}

    def hops(self):
        """Of the halo."""
        return -(-self.model.window // self.chunk) if self.devices > 1 else 0

    def launched_once(self):
        """Those kernels of a ring that take a halo and a chunk in one launch, or are for a chunk.

        The others have one for each.
        """
        kernels = self.kernels()
        if SHORT in kernels:
            return kernels - {FORWARD}
        return kernels - {FORWARD} if FUSED in kernels and self.hops() == 1 else set()

    def is_short(self):
        """Whether the window is one of the fused kernel for short ones, which takes no halo."""
        window = self.model.window
        return window is not None and window <= 128 and max(self.model.dims) <= 64

    def rounds_within(self):
        """Whether the fused kernel rounds the gradients of queries."""
        ordered = self.implementation != "mosaic_gpu_nondeterministic"
        window = self.model.window is not None or self.segments
        return ordered and window and max(self.model.dims) <= 128

    def arguments(self, mesh):
        """Shapes of the arguments of `program`, cut over the mesh."""
        model = self.model

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
        return q, k, v, sink, ids, dout

    def program(self, q, k, v, sink, ids, dout):
        """The output and all gradients."""

        def attend(q, k, v, sink):
            return rsj.ring_attention(
                q, k, v, window_size=self.model.window, num_sink_tokens=self.sinks,
                segment_ids=ids, sink_logits=sink, logits_soft_cap=self.model.softcap,
                implementation=self.implementation,
            )  # fmt: skip

        out, pull = jax.vjp(attend, q, k, v, sink)
        return out, pull(dout)

    def compile(self):
        """hopper.Program of the output and all gradients."""
        arguments = self.arguments(hopper.mesh(self.devices))
        return hopper.compile_program(self.program, arguments, self.devices)


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
# Forward a ring launches what one device does, and a halo's launch.
BOTH = ("mistral_7b_ring", "phi3_mini", "mistral_7b_hops", "float16", "gpt_oss_ring")
BOTH += ("mimo_v2_flash_ring", "sinks_segments_ring")
MOSAIC = {name: VARIANTS[name] for name in BOTH} | {
    "segments": Variant(SMALL, segments=True),
    "gpt_oss_segments": Variant(MODELS["gpt_oss"], segments=True),
    # Heads of 256 that go on from partial results take the most shared memory.
    "gemma2_9b_hops": Variant(MODELS["gemma2_9b"], devices=4, chunk=2048),
    "gemma3_4b_sinks_segments": Variant(MODELS["gemma3_4b"], sinks=4, segments=True),
}
VARIANTS |= {
    f"{name}_mosaic": dataclasses.replace(variant, implementation="mosaic_gpu")
    for name, variant in MOSAIC.items()
}
# In a process that has compiled a kernel it leaves no second dump: none above has these lengths.
VARIANTS["nondeterministic"] = dataclasses.replace(
    VARIANTS["mistral_7b_global"], implementation="mosaic_gpu_nondeterministic", chunk=4096
)
VARIANTS["default"] = Variant(MISTRAL, implementation=None, chunk=16384)

H256 = "dkey and its operands at H = 256 fill the registers; no tile was faster on an H100"
HALO = "adds the halo's dquery, a tile of 128 x 256 in float32, once and after the loop"
HEADS = "four heads in a tile of queries, 4% faster on an H100 than one head"
TWO = "two gradients of 64 x 128; smaller tiles were at least 4% slower on an H100"
MASK = "starts and positions for the mask of packed sequences, beside two gradients"
IEEE = "no tensor core computes IEEE float32; of 12 tiles tried on an H100 none was faster"

KEPT = "places in memory that stay the same: spilled before the loop, and memory is what limits it"
GRADIENTS = "two gradients of 64 x 128 beside logits, for 232 registers"
WIDE = "two tiles of weights and an accumulator of 64 x 256, or of 64 x 128 beside heads of 192"
THIRD = "three warpgroups of 160 registers; 64 keys a tile spill less but were 8% slower on an H100"
QUARTER = "two gradients of 64 x 64 beside logits, for 144 registers of three warpgroups"

# (variant, kernel): (bytes a thread may spill in all launches of the kernel together, why).
# Some bytes above what jax 0.11.2 spills with ptxas 13.5: other versions differ by a few.
SPILLS = {
    ("gemma2_9b", KEYS): (64, H256),
    ("gemma2_9b_ring", KEYS): (160, H256),
    ("gemma2_9b_ring", QUERY): (360, HALO),
    ("gemma3_4b", KEYS): (16, H256),
    ("gemma3_4b_ring", KEYS): (48, H256),
    ("gemma3_4b_ring", QUERY): (360, HALO),
    ("mistral_7b", KEYS): (24, HEADS),
    ("mistral_7b_global", KEYS): (24, HEADS),
    ("mistral_7b_ring", KEYS): (48, HEADS),
    ("mistral_7b_hops", KEYS): (72, HEADS),
    ("sinks_segments", KEYS): (160, MASK),
    ("sinks_segments_ring", KEYS): (296, MASK),
    ("float16", KEYS): (24, TWO),
    ("gemma2_9b_hops_mosaic", FORWARD): (64, WIDE),
    ("gemma2_9b_hops_mosaic", FUSED): (660, GRADIENTS),
    ("gemma3_4b_sinks_segments_mosaic", FORWARD): (352, WIDE),
    ("gemma3_4b_sinks_segments_mosaic", FUSED): (160, GRADIENTS),
    ("gemma3_4b_sinks_segments_mosaic", SINKS): (700, KEPT),
    ("mimo_v2_flash_ring_mosaic", FORWARD): (48, WIDE),
    ("gpt_oss_ring_mosaic", FORWARD): (560, THIRD),
    ("gpt_oss_ring_mosaic", SHORT): (96, QUARTER),
    ("gpt_oss_segments_mosaic", FORWARD): (448, THIRD),
    ("gpt_oss_segments_mosaic", SHORT): (112, QUARTER),
    ("sinks_segments_ring_mosaic", FORWARD): (352, MASK),
    ("sinks_segments_ring_mosaic", FUSED): (344, MASK),
    ("sinks_segments_ring_mosaic", SINKS): (360, KEPT),
    ("default", FUSED): (136, GRADIENTS),
    ("float16_mosaic", FUSED): (136, GRADIENTS),
    ("mistral_7b_ring_mosaic", FUSED): (136, GRADIENTS),
    ("mistral_7b_hops_mosaic", FUSED): (220, GRADIENTS),
    ("nondeterministic", FUSED): (96, GRADIENTS),
    ("phi3_mini_mosaic", FUSED): (40, GRADIENTS),
    ("segments_mosaic", FUSED): (208, MASK),
    ("segments_mosaic", FORWARD): (88, MASK),
    ("float32", FORWARD): (1500, IEEE),
    ("float32", QUERY): (1600, IEEE),
    ("float32", KEYS): (3500, IEEE),
}


def test_allowances_name_kernels_of_variants():
    for name, kernel in SPILLS:
        assert name in VARIANTS and kernel in KERNELS, (name, kernel)


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_for_hopper_without_spills(name, record_property):
    variant = VARIANTS[name]
    program = variant.compile()
    record_property("kernels", [[name, *dataclasses.astuple(k)] for k in program.kernels])
    kernels = variant.kernels()
    assert set(program.launches) == kernels
    assert ("mosaic_gpu" in program.hlo) == (variant.implementation != "triton")
    assert {base_name(kernel) for kernel in program.kernels} == kernels
    if variant.devices > 1:
        assert "collective-permute-start" in program.hlo
        assert "all-gather" not in program.hlo or variant.segments
        for kernel in kernels - variant.launched_once():
            assert program.launches.count(kernel) >= 2, "one for the halo, one for the chunk"
        for kernel in variant.launched_once():
            assert program.launches.count(kernel) == 1
    if variant.devices > 1 and variant.model.window < variant.chunk and not variant.sinks:
        steps = program.steps()
        starts, ends = ([n for n, x in enumerate(steps) if x == y] for y in ("start", "done"))
        assert len(starts) == len(ends) == 2, "the halo, and its gradients"
        assert FORWARD in steps[starts[0] : ends[0]], "travels under the local kernel"
        if FUSED in kernels:
            assert FUSED in steps[: starts[1]], "has a halo's gradients and the chunk's"
        else:
            backward = SHORT if SHORT in kernels else QUERY
            assert backward in steps[starts[1] : ends[1]], "travel under the local kernel"
    for base in kernels:
        spilled = [kernel for kernel in program.kernels if base_name(kernel) == base]
        allowed, _ = SPILLS.get((name, base), (0, ""))
        assert sum(kernel.spills for kernel in spilled) <= allowed, spilled


def base_name(kernel):
    """The kernel's name without the number that XLA gives to a second one of that name."""
    return next(name for name in KERNELS if kernel.name.startswith(name))
