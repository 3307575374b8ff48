"""The Mosaic GPU kernels under ``jax_enable_x64``, lowered for an H100 that is not there.

Python's numbers are 64-bit then, and what mixes them with 32-bit arrays fails when it is lowered.
"""

import jax
import pytest

from tests.helpers.jaxpr_hashes import abstract_mesh
from tests.helpers.kernel_variants import VARIANTS

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11's Mosaic")
MOSAIC = [name for name, variant in VARIANTS.items() if variant.takes_mosaic()]
# Each kernel once, with documents and without.
BY_DEFAULT = (
    "phi3_mini_mosaic",
    "gpt_oss_segments_mosaic",
    "segments_mosaic",
    "gemma3_4b_sinks_segments_mosaic",
    "nondeterministic",
)
OTHERS = [pytest.param(name, marks=pytest.mark.aot) for name in MOSAIC if name not in BY_DEFAULT]


@pytest.mark.parametrize("name", [*BY_DEFAULT, *OTHERS])
def test_kernels_are_lowered(name):
    variant = VARIANTS[name]
    mesh = abstract_mesh(variant.devices)
    with jax.enable_x64(True), jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(variant.program).trace(*variant.arguments(mesh))
        lowered = traced.lower(lowering_platforms=("cuda",))
    out, gradients = lowered.out_info
    found = {x.dtype.name for x in jax.tree.leaves((out, gradients[:3]))}
    assert found == {variant.dtype}
    assert "mosaic_gpu" in lowered.as_text()
