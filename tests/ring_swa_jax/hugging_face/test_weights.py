"""A checkpoint's tensors as a module's parameters; `test_golden` compares what they compute."""

import jax
import numpy as np
import pytest
from flax import nnx

import ring_swa_jax as rsj
import ring_swa_jax.nnx
from tests.ring_swa_jax.hugging_face.cases import weights_of
from tests.ring_swa_jax.hugging_face.golden import golden, names

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "sliding_window": 5,
}


def layers_of(model_type, **more):
    return rsj.settings_from_hugging_face(SIZES | {"model_type": model_type} | more)


def tensors_of(layers, layer=0, *, fused=False):
    """Tensors with the shapes that the settings ask for."""
    s = layers.kinds[layers.layers[layer]]
    n, k, h, e = s["num_heads"], s["num_kv_heads"], s["head_dim"], s["in_features"]
    rows = {"q_proj": n * h, "k_proj": k * h, "v_proj": k * h}
    if fused:
        rows = {"qkv_proj": (n + 2 * k) * h}
    shapes = {f"{name}.weight": (size, e) for name, size in rows.items()}
    shapes["o_proj.weight"] = (e, n * h)
    if s["use_bias"]:
        shapes |= {f"{name}.bias": (size,) for name, size in rows.items()}
        if s.get("use_out_bias", True):
            shapes["o_proj.bias"] = (e,)
    if s.get("qk_norm"):
        shapes |= {"q_norm.weight": (h,), "k_norm.weight": (h,)}
    return weights_of(shapes, layer)


def test_where_a_number_goes():
    layers = layers_of("qwen2")
    tensors = tensors_of(layers)
    p = rsj.weights_from_hugging_face(tensors, layers, 0)
    assert p["query"]["kernel"].shape == (12, 4, 6)
    assert p["query"]["kernel"][5, 2, 3] == tensors["q_proj.weight"][2 * 6 + 3, 5]
    assert p["key"]["bias"][1, 4] == tensors["k_proj.bias"][6 + 4]
    assert p["out"]["kernel"][2, 3, 7] == tensors["o_proj.weight"][7, 2 * 6 + 3]
    assert "bias" not in p["out"]


def test_fused_projections_lie_one_below_the_other():
    layers = layers_of("phi3")
    tensors = tensors_of(layers, fused=True)
    p = rsj.weights_from_hugging_face(tensors, layers, 0)
    fused = tensors["qkv_proj.weight"]
    assert p["key"]["kernel"][5, 1, 3] == fused[24 + 6 + 3, 5]
    assert p["value"]["kernel"][5, 1, 3] == fused[24 + 12 + 6 + 3, 5]


def test_gemmas_norms_gain_one():
    layers = layers_of("gemma3_text")
    tensors = tensors_of(layers)
    p = rsj.weights_from_hugging_face(tensors, layers, 0)
    np.testing.assert_array_equal(p["query_norm"], tensors["q_norm.weight"] + 1)


@pytest.mark.parametrize("name", ["gpt_oss", "afmoe", "olmo3", "gemma4", "mimo_v2_flash"])
def test_nnx_update_takes_them(name):
    model = golden(name)
    layers = rsj.settings_from_hugging_face(model.config)
    for i, shapes in model.shapes.items():
        parameters = rsj.weights_from_hugging_face(weights_of(shapes, i), layers, i)
        kind = layers.kinds[layers.layers[i]]
        module = rsj.nnx.RingSlidingWindowAttention(**kind, rngs=nnx.Rngs(0))
        nnx.update(module, parameters)
        state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        assert jax.tree.structure(state) == jax.tree.structure(parameters)
        jax.tree.map(np.testing.assert_array_equal, state, parameters)


@pytest.mark.parametrize("name", names())
def test_the_way_back(name):
    model = golden(name)
    layers = rsj.settings_from_hugging_face(model.config, max_length=model.max_length)
    for i, shapes in model.shapes.items():
        tensors = weights_of(shapes, i)
        parameters = rsj.weights_from_hugging_face(tensors, layers, i)
        back = rsj.weights_to_hugging_face(parameters, layers, i, like=tensors)
        assert back.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert back[key].dtype == tensor.dtype
            np.testing.assert_allclose(back[key], tensor, atol=1e-6)


def test_the_way_back_has_the_dtypes_of_the_checkpoint():
    layers = layers_of("gemma3_text")
    tensors = {name: t.astype(jax.numpy.bfloat16) for name, t in tensors_of(layers).items()}
    wide = {name: t.astype(np.float32) for name, t in tensors.items()}
    parameters = rsj.weights_from_hugging_face(wide, layers, 0)
    back = rsj.weights_to_hugging_face(parameters, layers, 0, like=tensors)
    jax.tree.map(np.testing.assert_array_equal, back, tensors)
    assert {t.dtype for t in back.values()} == {np.dtype(jax.numpy.bfloat16)}


def test_parameters_that_are_no_layer_of_the_checkpoint():
    layers = layers_of("mistral")
    tensors = tensors_of(layers)
    good = rsj.weights_from_hugging_face(tensors, layers, 0)
    query = {"query": {"kernel": good["key"]["kernel"]}}
    without = {name: p for name, p in good.items() if name != "value"}
    for parameters, message in (
        (good | query, r"'query.kernel' should have .*\(12, 4, 6\), got \(12, 2, 6\)"),
        (without, r"'value.kernel' should have .*\(12, 2, 6\), got None"),
        (good | {"sink_logits": np.zeros(4)}, r"no tensor has a place for \['sink_logits'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            rsj.weights_to_hugging_face(parameters, layers, 0, like=tensors)


def test_the_dtype_stays():
    layers = layers_of("gemma3_text")
    tensors = {name: t.astype(np.float16) for name, t in tensors_of(layers).items()}
    p = rsj.weights_from_hugging_face(tensors, layers, 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(p)} == {np.dtype(np.float16)}


def test_a_wrong_shape_names_the_tensor_and_what_was_expected():
    layers = layers_of("mistral")
    tensors = tensors_of(layers)
    tensors["k_proj.weight"] = tensors["q_proj.weight"]
    with pytest.raises(
        ValueError, match=r"'k_proj.weight' should have .*\(12, 12\), got \(24, 12\)"
    ):
        rsj.weights_from_hugging_face(tensors, layers, 0)


def test_a_missing_tensor_names_the_shape_and_what_there_is():
    layers = layers_of("mistral")
    tensors = tensors_of(layers)
    del tensors["o_proj.weight"]
    with pytest.raises(
        ValueError, match=r"'o_proj.weight'.*\(12, 24\); there are .*'k_proj.weight"
    ):
        rsj.weights_from_hugging_face(tensors, layers, 0)


def test_a_tensor_without_a_place():
    layers = layers_of("mistral")
    tensors = tensors_of(layers) | {"sinks": np.zeros(4)}
    with pytest.raises(ValueError, match=r"no place for \{'sinks': \(4,\)\}"):
        rsj.weights_from_hugging_face(tensors, layers, 0)


def test_a_layer_that_is_no_attention():
    layers = layers_of("lfm3")
    with pytest.raises(ValueError, match="layer 0 is 'conv'"):
        rsj.weights_from_hugging_face({}, layers, 0)
