"""Backward launches that add to the gradients of queries that other launches have left.

The kernels run in the simulator; beside them is "xla".
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KeyRun, Spec, attend_keys_backward
from tests.helpers.simulator import launches, simulated

pytestmark = pytest.mark.usefixtures("on_hopper")

QUERIES, KEYS = 72, 136
FLOAT32 = jnp.dtype(jnp.float32)


def gradients(implementation, dim):
    """dq, and (dk, dv) of three launches, each of keys that other queries see."""
    seeds = iter(jax.random.split(jax.random.key(0), 12))

    def random(*shape, dtype=jnp.bfloat16):
        return jax.random.normal(next(seeds), shape, dtype)

    query, dout = random(2, QUERIES, 2, dim), random(2, QUERIES, 2, dim)
    delta = random(2, 2, QUERIES, dtype=jnp.float32)
    lse = 5 + jnp.abs(random(2, 2, QUERIES, dtype=jnp.float32))
    spec, dquery, dkeys = Spec(None, 0, 0.1, None, None), None, []
    # The first keys that queries see, counted from behind the last key. Some queries see none.
    rows = jnp.arange(QUERIES)[None]
    starts = [
        jnp.where(rows < 40, -KEYS, 0),
        jnp.where(rows < 64, -90, 0),
        jnp.full_like(rows, -3),
    ]
    for number, start in enumerate(starts):
        key, value = random(2, KEYS, 1, dim), random(2, KEYS, 1, dim)
        dtype = FLOAT32 if number + 1 == len(starts) else None
        start = jnp.broadcast_to(start, (2, QUERIES)).astype(jnp.int32)
        dquery, *dkey, _ = attend_keys_backward(
            spec, implementation, query, KeyRun(key, value, -KEYS), start, None,
            lse, delta, dout, dquery, dtype, FLOAT32,
        )  # fmt: skip
        dkeys += dkey
    return [dquery, *dkeys]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 192])
def test_the_last_launch_leaves_the_sum_of_all(dim):
    expected = gradients("xla", dim)
    with simulated():
        found = gradients("mosaic_gpu", dim)
        assert launches.count("ring_swa_backward_finish") == 1
    for x, y in zip(found, expected, strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.linalg.norm(x - y) <= 0.01 * np.linalg.norm(y)
