"""Settings pickle, copy, hash and compare; caches go through flax's serialisation."""

import copy
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

import ring_swa_jax as rsj
from ring_swa_jax.nnx import attention_fn
from tests.helpers.layers import E, X, make_linen, make_nnx

MESH = AbstractMesh((2,), ("seq",), axis_types=(AxisType.Auto,))
SETTINGS = {
    "rope": rsj.Rope(5e5, scaling=rsj.YarnScaling(8.0, 4096)),
    "linear": rsj.LinearScaling(8.0),
    "llama3": rsj.Llama3Scaling(),
    "model": rsj.layer_settings("gpt_oss_20b"),
    "function": attention_fn(window_size=3, seq_axis=("a", "b")),
    "function on a mesh": attention_fn(window_size=3, mesh=MESH),
    "linen": make_linen(in_features=E),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    value = SETTINGS[name]
    for copied in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
        assert copied == value
        assert hash(copied) == hash(value)
        assert {value: 1}[copied] == 1


def test_every_model_is_plain_data():
    models = pickle.loads(pickle.dumps(rsj.models))
    assert models == rsj.models
    assert len({hash(model) for model in models.values()}) == len(models)
    for model in models.values():
        assert type(model.kinds) is dict
        assert all(type(kind) is dict for kind in model.kinds.values())


def test_another_models_settings_differ():
    one, other = rsj.layer_settings("gemma3_4b"), rsj.layer_settings("gemma3_4b")
    other.kinds["local"]["window_size"] = 511
    assert one != other
    assert hash(one) != hash(other)


def test_nnx_modules():
    layer = make_nnx()
    right = layer(jnp.asarray(X))
    for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert nnx.graphdef(copied) == nnx.graphdef(layer)
        np.testing.assert_array_equal(copied(jnp.asarray(X)), right)


def filled(**options):
    k, v = jax.random.normal(jax.random.key(0), (2, 2, 9, 1, 8))
    return rsj.prefill_cache(k, v, window_size=3, num_sink_tokens=2, max_trim=2, **options)


def test_caches():
    cache, empty = filled(), rsj.init_cache(2, 1, 8, window_size=3, num_sink_tokens=2, max_trim=2)
    state = flax.serialization.to_state_dict(cache)
    assert set(state) == {"key", "value", "sink_key", "sink_value", "length", "trimmed"}
    for copied in (
        pickle.loads(pickle.dumps(cache)),
        copy.deepcopy(cache),
        flax.serialization.from_bytes(empty, flax.serialization.to_bytes(cache)),
    ):
        assert jax.tree.structure(copied) == jax.tree.structure(cache)
        jax.tree.map(np.testing.assert_array_equal, copied, cache)
