"""Inside other people's modules: ids as Flax's mask, Linen's initialisation, rope that is said."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import ring_swa_jax as rsj
from ring_swa_jax import linen
from ring_swa_jax.nnx import RingSlidingWindowAttention, attention_fn
from tests.helpers.layers import make_linen, quick
from tests.helpers.routes import make_mesh

pytestmark = pytest.mark.usefixtures("unchecked_signatures")

X = jax.random.normal(jax.random.key(0), (2, 16, 32))
IDS = np.array([[0] * 5 + [1] * 8 + [-1] * 3, [2] * 16])


def dense_mask(window):
    """[B, 1, S, S] of the ids, as these models make it."""
    i = np.arange(16)
    near = (i[None] <= i[:, None]) & (i[:, None] - i[None] <= window)
    return ((IDS[:, :, None] == IDS[:, None]) & (IDS >= 0)[:, :, None] & near)[:, None]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, jnp.int32])
@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_ids_as_the_mask(framework, dtype):
    ids, mine = IDS.astype(dtype), attention_fn(window_size=3, seq_axis=None)
    ids = jnp.asarray(ids) if dtype is jnp.int32 else ids
    if framework == "nnx":
        ours, theirs = (
            nnx.MultiHeadAttention(4, 32, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))
            for attend in (mine, nnx.dot_product_attention)
        )
        got, want = ours(X, mask=ids), theirs(X, mask=jnp.asarray(dense_mask(3)))
    else:
        ours, theirs = (
            nn.MultiHeadDotProductAttention(4, attention_fn=attend)
            for attend in (mine, nn.dot_product_attention)
        )
        variables = theirs.init(jax.random.key(0), X)
        got = ours.apply(variables, X, mask=ids)
        want = theirs.apply(variables, X, mask=jnp.asarray(dense_mask(3)))
    np.testing.assert_allclose(got[IDS >= 0], want[IDS >= 0], atol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [np.ones((2, 1, 16, 16), bool), np.ones((2, 16), bool), np.ones((2, 1, 16, 16), np.int32)],
    ids=["dense", "boolean", "dense integers"],
)
def test_other_masks_raise(mask):
    attend = attention_fn(window_size=3, seq_axis=None)
    layer = nnx.MultiHeadAttention(4, 32, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"integer segment ids \[B, S\]"):
        layer(X, mask=jnp.asarray(mask))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (2, 1), (3, 5)], ids=str)
def test_linen_initialises_with_any_batch_and_length(shape, kind):
    """The mesh divides neither; the result is right all the same, and nobody is warned."""
    x = jnp.ones((*shape, 32))
    axes = dict(seq_axis="seq", batch_axis="data")
    ours = make_linen(4, **axes)
    attend = linen.attention_fn(window_size=3, **axes)
    flax = nn.MultiHeadDotProductAttention(4, attention_fn=attend)
    right = quick(make_linen(4).init_with_output)(jax.random.key(0), x)[0]
    with jax.set_mesh(make_mesh(kind, data=2, seq=4)), warnings.catch_warnings():
        warnings.simplefilter("error", rsj.RepeatedWorkWarning)
        y, variables = quick(ours.init_with_output)(jax.random.key(0), x)
        jax.eval_shape(flax.init, jax.random.key(0), x)
        with pytest.raises(ValueError, match="is not a multiple"):
            jax.eval_shape(ours.apply, variables, x)
    np.testing.assert_allclose(jax.device_get(y), right, atol=1e-5)


def test_rope_must_be_said():
    with pytest.raises(TypeError, match="rope"):
        RingSlidingWindowAttention(4, 32, window_size=3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="rope"):
        linen.RingSlidingWindowAttention(4, window_size=3)
