"""What a hop of the halo carries: keys before the chunk, and zeros for padding among documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._halo import RingHalo
from tests.helpers.routes import make_mesh


def test_padding_travels_as_zeros():
    """Tokens 2 and 3 of each chunk of four are padding; NaN there reaches no other device."""
    halo = RingHalo(SequenceAxis("seq", 2), (3,))
    x = jnp.arange(1.0, 9.0).reshape(1, 8, 1, 1).at[:, jnp.array([2, 3, 6, 7])].set(jnp.nan)
    start = jnp.array([[0, 0, 3, 4] * 2], jnp.int32)

    def fetch(x, start):
        return halo.fetch(0, x, 2 * x, start)

    spec = P(None, "seq")
    program = jax.shard_map(
        fetch, mesh=make_mesh(seq=2), in_specs=(spec, spec), out_specs=(spec, spec)
    )
    key, value = (np.asarray(x).ravel() for x in jax.jit(program)(x, start))
    assert key.tolist() == [0, 0, 0, 2, 0, 0]
    assert value.tolist() == [0, 0, 0, 4, 0, 0]


def test_a_nan_stays_in_its_row_of_the_batch():
    """The third of several hops is sent when the first is done, whatever the first computed."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 1, 16))
    attend = functools.partial(
        rsj.ring_attention, window_size=15, exchange="halo", mesh=make_mesh(seq=4)
    )

    @jax.jit
    def gradients(q):
        return jax.vjp(attend, q, k, v)[1](v)

    for good, bad in zip(gradients(q), gradients(q.at[0, -1].set(jnp.nan)), strict=True):
        np.testing.assert_array_equal(good[1], bad[1])
