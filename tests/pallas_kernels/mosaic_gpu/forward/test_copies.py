"""How the forward kernel's results reach global memory, lowered for an H100 that is not there.

The simulator cannot tell: it copies as if all arrays were described to TMA.
"""

import jax
import jax.numpy as jnp
import pytest

import ring_swa_jax
from tests.helpers.jaxpr_hashes import abstract_mesh

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs jax 0.11's Mosaic")
TENSOR_STORE = "cp.async.bulk.tensor.global.shared.cta"
PLAIN_STORE = "cp.async.bulk.global.shared::cta.bulk_group"


@pytest.mark.parametrize("window", [40, None])
def test_the_last_tile_writes_nothing_into_the_next_head(window):
    """A plain copy of a tile's log-sum-exp would: 100 queries are no multiple of a tile."""

    def forward(query, key, value):
        return ring_swa_jax.ring_sliding_window_attn(
            query, key, value, window_size=window, implementation="mosaic_gpu"
        )

    query = jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 100, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(abstract_mesh(1)):
        traced = jax.jit(forward).trace(query, key, key)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert TENSOR_STORE in text
    assert PLAIN_STORE not in text
