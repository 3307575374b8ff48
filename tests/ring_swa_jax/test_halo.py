"""What a hop of the halo carries: keys before the chunk, and zeros for padding among documents."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._halo import RingHalo
from tests.helpers.layers import quick
from tests.helpers.routes import make_mesh, with_gradients


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


def test_a_nan_in_one_row_leaves_other_rows_alone():
    """Of three hops, the last one leaves when a number of the first one is known."""
    q, k, v, dout = np.random.default_rng(0).standard_normal((4, 2, 16, 1, 16), np.float32)

    def attend(q, k, v, *_):
        return rsj.ring_attention(q, k, v, window_size=10, exchange="halo")

    program = quick(with_gradients(attend))
    with_nan = q.copy()
    with_nan[0, 12] = np.nan
    with jax.set_mesh(make_mesh(seq=4)):
        first, second = (program(x, k, v, None, None, dout)[:4] for x in (q, with_nan))
    for x, y in zip(first, second, strict=True):
        assert np.isnan(y[0]).any()
        np.testing.assert_array_equal(x[1], y[1])
