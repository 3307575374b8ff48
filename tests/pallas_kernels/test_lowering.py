"""Programs lower for GPUs that are not here, without a plug-in and on every version of jax."""

import dataclasses
import re

import jax
import pytest

from tests.helpers.jaxpr_hashes import abstract_mesh
from tests.helpers.kernel_variants import ELSEWHERE, VARIANTS, Variant
from tests.helpers.models import MODELS

HEAD_80 = dataclasses.replace(MODELS["olmo3_7b"], dims=(80, 80), window=127)
X64 = {
    "gpt_oss": ELSEWHERE["gpt_oss"],
    "head_80": Variant(HEAD_80, chunk=1024),
    "float32": ELSEWHERE["float32"],
    "sinks_segments_ring": VARIANTS["sinks_segments_ring"],
    "hops": VARIANTS["mistral_7b_hops"],
}
RINGS = ("sinks_segments_ring", "hops")
WIDE = re.compile(r"\dxf64")
"""Arrays of float64; a constant of that type is no harm."""
SLOW = pytest.mark.slow


@pytest.fixture
def enable_x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def lower(variant):
    """The text of the variant's program, forward and backward, for its target."""
    mesh = abstract_mesh(variant.devices, variant.target)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(variant.program).trace(*variant.arguments(mesh))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def on(target, variant, implementation):
    return dataclasses.replace(
        variant, target=target, implementation=implementation, chunk=min(variant.chunk, 2048)
    )


@pytest.mark.parametrize(
    "name", ["gpt_oss", "head_80", "float32", *(pytest.param(name, marks=SLOW) for name in RINGS)]
)
def test_triton_lowers_for_an_a100_under_x64(name, enable_x64):
    text = lower(on("a100", X64[name], None))
    assert "xla.gpu.triton" in text and not WIDE.search(text)


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("sinks_segments_ring", marks=SLOW)])
def test_xla_lowers_for_an_h100_under_x64(name, enable_x64):
    assert "gpu.triton" not in lower(on("h100", X64[name], "xla"))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a100", "h100"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_every_triton_variant_lowers(name, target):
    assert "xla.gpu.triton" in lower(on(target, ELSEWHERE[name], "triton"))
