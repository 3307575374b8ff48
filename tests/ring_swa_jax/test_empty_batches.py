"""No rows at all: empty results and gradients, and a learned sink whose gradient is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers.layers import make_linen, make_nnx
from tests.helpers.routes import make_mesh

Q, K, V = jnp.zeros((0, 8, 4, 16)), jnp.zeros((0, 8, 2, 16)), jnp.zeros((0, 8, 2, 8))
IDS = jnp.zeros((0, 8), jnp.int32)
OPTIONS = dict(window_size=3, num_sink_tokens=1)


def ring(q, k, v, sink):
    mesh = make_mesh(data=2, seq=2)
    return rsj.ring_attention(
        q, k, v, sink_logits=sink, segment_ids=IDS, mesh=mesh, batch_axis="data", **OPTIONS
    )


def in_shard_map(q, k, v, sink):
    attend = lambda q, k, v, sink: rsj.ring_streaming_llm_attn(  # noqa: E731
        q, k, v, sink_logits=sink, axis_name="seq", **OPTIONS
    )
    spec = P(None, "seq")
    mesh = make_mesh(seq=2)
    specs = (spec, spec, spec, P())
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec)(q, k, v, sink)


USES = {
    "here": lambda *x: rsj.ring_streaming_llm_attn(*x[:3], sink_logits=x[3], **OPTIONS),
    "ring": ring,
    "shard_map": in_shard_map,
    "reference": lambda *x: rsj.reference_attention(*x[:3], sink_logits=x[3], **OPTIONS),
}


@pytest.mark.parametrize("name", USES)
def test_results_and_gradients(name):
    arguments = (Q, K, V, jnp.ones(4))
    out, pull = jax.vjp(USES[name], *arguments)
    assert out.shape == (0, 8, 4, 8)
    gradients = pull(out)
    assert [x.shape for x in gradients] == [x.shape for x in arguments]
    np.testing.assert_array_equal(gradients[3], 0)


def test_decoding():
    for cache in (
        rsj.init_cache(0, 2, 16, value_dim=8, **OPTIONS),
        rsj.prefill_cache(K, V, segment_ids=IDS, **OPTIONS),
    ):
        out, after = rsj.decode_attention(Q[:, :2], K[:, :2], V[:, :2], cache, **OPTIONS)
        assert out.shape == (0, 2, 4, 8)
        assert after.key.shape == (0, 2, 4, 16)


def test_modules():
    x = jnp.zeros((0, 8, 16))
    assert make_nnx(4, 16, **OPTIONS)(x, segment_ids=IDS).shape == x.shape
    linen = make_linen(4, **OPTIONS)
    assert linen.init_with_output(jax.random.key(0), x)[0].shape == x.shape
    layer = make_nnx(4, 16, **OPTIONS)
    graph, state = nnx.split(layer)
    gradients = jax.grad(lambda state: nnx.merge(graph, state)(x).sum())(state)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))
