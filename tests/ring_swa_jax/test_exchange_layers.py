"""Both Flax modules and attention_fn with a layout and an exchange."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import ring_swa_jax.linen
import ring_swa_jax.nnx
from ring_swa_jax._layout import from_dual_order, to_dual_order
from tests.helpers.errors import complains
from tests.helpers.routes import make_mesh

DEVICES, LENGTH, E = 4, 32, 16
SIZES = dict(num_heads=2, in_features=E, head_dim=16, rope=ring_swa_jax.Rope())
IDS = jnp.asarray([[0] * 11 + [1] * 18 + [-1] * 3])


def features():
    return jnp.asarray(np.random.default_rng(0).standard_normal((1, LENGTH, E)), jnp.float32)


def same(got, want):
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want) != 0


def in_dual_order(layer, x, segment_ids):
    """The layer's result in the order of the tokens, from arrays in the other order."""
    x = to_dual_order(x, DEVICES)
    ids = None if segment_ids is None else to_dual_order(segment_ids, DEVICES)
    return from_dual_order(layer(x, ids), DEVICES)


@pytest.mark.parametrize(
    ("window", "ids", "kind"),
    [
        pytest.param(None, IDS, AxisType.Auto, marks=pytest.mark.slow),
        (5, None, AxisType.Auto),
        pytest.param(5, IDS, AxisType.Explicit, marks=pytest.mark.slow),
    ],
    ids=["full_packed", "window", "explicit"],
)
def test_nnx_in_dual_chunk_order_turns_by_the_tokens_positions(window, ids, kind):
    def module(**settings):
        make = ring_swa_jax.nnx.RingSlidingWindowAttention
        return make(**SIZES, window_size=window, rngs=nnx.Rngs(0), **settings)

    whole, cut = module(seq_axis=None), module(layout="dual_chunk")
    run = nnx.jit(lambda layer, x, ids: layer(x, segment_ids=ids))
    want = run(whole, features(), ids)
    mesh = make_mesh(kind, seq=DEVICES)
    with jax.set_mesh(mesh):

        def placed(x):
            where = jax.sharding.NamedSharding(mesh, jax.P(None, "seq"))
            return jax.device_put(x, where) if kind == AxisType.Explicit else x

        x = placed(to_dual_order(features(), DEVICES))
        packed = None if ids is None else placed(to_dual_order(ids, DEVICES))
        got = jax.device_get(run(cut, x, packed))
    got = from_dual_order(jnp.asarray(got), DEVICES)
    real = np.ones(LENGTH, bool) if ids is None else np.asarray(ids[0] >= 0)
    same(got[:, real], want[:, real])


def test_linen_takes_both_settings():
    def module(**settings):
        return ring_swa_jax.linen.RingSlidingWindowAttention(**SIZES, window_size=None, **settings)

    variables = module(seq_axis=None).init(jax.random.key(0), features())
    want = module(seq_axis=None).apply(variables, features())
    with jax.set_mesh(make_mesh(seq=DEVICES)):
        cut = module(layout="dual_chunk", exchange="ring")
        apply = jax.jit(lambda x, ids: cut.apply(variables, x, segment_ids=ids))
        same(in_dual_order(apply, features(), None), want)


def test_attention_fn_takes_both_settings():
    def attend(**settings):
        attention = ring_swa_jax.linen.attention_fn(window_size=None, **settings)
        make = flax.linen.MultiHeadDotProductAttention
        return make(num_heads=4, qkv_features=64, attention_fn=attention)

    whole = attend(seq_axis=None)
    variables = whole.init(jax.random.key(0), features())
    want = whole.apply(variables, features())
    with jax.set_mesh(make_mesh(seq=DEVICES)):
        cut = attend(layout="dual_chunk", exchange="all_to_all")
        apply = jax.jit(lambda x, _: cut.apply(variables, x))
        same(in_dual_order(apply, features(), None), want)


def test_wrong_names_and_a_cache_of_half_chunks_raise():
    for wrong in (dict(layout="zigzag"), dict(exchange="halos")):
        with complains(ValueError, *wrong.values()):
            ring_swa_jax.nnx.attention_fn(window_size=3, **wrong)
        with complains(ValueError, *wrong.values()):
            make = ring_swa_jax.nnx.RingSlidingWindowAttention
            make(**SIZES, window_size=3, rngs=nnx.Rngs(0), **wrong)
    layer = ring_swa_jax.nnx.RingSlidingWindowAttention(
        **SIZES, window_size=3, layout="dual_chunk", rngs=nnx.Rngs(0)
    )
    expected = complains(ValueError, "dual_chunk", DEVICES, "contiguous")
    with jax.set_mesh(make_mesh(seq=DEVICES)), expected:
        layer.prefill(features())
