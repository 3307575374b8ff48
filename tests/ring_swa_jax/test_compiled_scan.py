"""Layers in a scan, compiled for two Hopper GPUs: what the scan keeps is whole.

Deselected by default, as `test_compiled_scaling.py`: `pytest -m aot`.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers import compile_target

pytestmark = pytest.mark.aot

KEEP = jax.checkpoint_policies.save_only_these_names("context")
COMPUTATION = re.compile(r"^%?(dynamic-slice-fusion[\w.\-]*) \(.*?^\}", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
def test_launches_are_not_fused_with_the_stack(implementation):
    """XLA fuses a launch with the slice of the array that the scan stacks.

    The rows that see the halo are a second launch, whose output is that of the first, continued.
    Written into the stack, the rows of the first launch would be missing there. What else reads
    the result would have a launch of its own.
    """

    def loss(weights, x):
        def layer(x, weight):
            q = jnp.einsum("bsnh,hk->bsnk", x, weight)
            out = rsj.ring_attention(q, q, q, window_size=127, implementation=implementation)
            return x + out, None

        layer = jax.checkpoint(layer, policy=KEEP, prevent_cse=False)
        return (jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2).mean()

    mesh = compile_target.mesh(2)

    def shape(*dims, spec):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    arguments = shape(4, 128, 128, spec=P()), shape(1, 2048, 2, 128, spec=P(None, "seq"))
    program = compile_target.compile_program(jax.grad(loss), arguments, 2)
    assert program.launches.count("ring_swa_forward") == 2
    fused = [match[0] for match in COMPUTATION.finditer(program.hlo)]
    assert not [text for text in fused if "ring_swa_forward" in text]
