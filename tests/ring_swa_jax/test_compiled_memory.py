"""The memory of a device in a ring of two Hopper GPUs is what benchmarks/_ring_memory.py says.

Deselected by default, as `test_compile.py`: `pytest -m aot`.
"""

import jax
import pytest

from benchmarks import ring
from benchmarks._ring_shapes import SHAPES
from tests.helpers import compile_target

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("name", ["mistral", "gptoss", "sliding-8000", "streaming-varlen-1000"])
def test_compiled_memory_is_that_of_the_formula(name):
    shape, mesh = SHAPES[name], compile_target.mesh(2)
    with jax.set_mesh(mesh):
        built = ring.build(shape, mesh, "ring", "triton")
    assert not isinstance(built, str), built
    for kind, (got, formula) in ring.memory(shape, mesh.size, built).items():
        assert got.peak <= 1.001 * formula.peak, (kind, got, formula)
        if not shape.documents and not shape.sinks:
            assert got.peak >= 0.999 * formula.peak, (kind, got, formula)
