"""Attention layers of transformers' models, from their config.json and tensors."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import ring_swa_jax as rsj
from tests.helpers.layers import quick
from tests.helpers.one_program import one_program_for_all  # noqa: F401  a fixture
from tests.ring_swa_jax.hugging_face.cases import SEGMENT_IDS, inputs
from tests.ring_swa_jax.hugging_face.golden import golden, names, records
from tests.ring_swa_jax.hugging_face.ours import Layer, relative_difference

NAMES = names()
LAYERS = [(name, int(i)) for name in NAMES for i in records()["models"][name]["shapes"]]
TOLERANCE = 1e-5
# The attention of these has settings of its own, and so takes programs of its own: slow tests.
OWN_PROGRAMS = {
    "diffusion_gemma",
    "gemma2",
    "gemma3n",
    "gemma4",  # of which the default tests cut and decode layer 3, with the keys of layer 1
    "gemma4_unified",
    "granite_swa",
    "granitemoe_swa",
    "laguna",
    "modernbert_decoder",
    "muse_glimmer",
    "muse_spark",
    "step3p7",
    "t5gemma",
    "vaultgemma",
}
# So have these layers, each beside another one of its model in the default tests.
OWN_PROGRAMS_OF_LAYERS = {("flint", 0), ("gemma3", 3), ("mimo_v2_flash", 0)}
DEFAULT = [
    layer
    for layer in LAYERS
    if layer[0] not in OWN_PROGRAMS and layer not in OWN_PROGRAMS_OF_LAYERS
]
# Keys of an earlier layer and chunks: what only such layers do with other devices.
CUT = {("gemma4", 3), ("llama4", 0)}
# Between them everything that a layer does with caches.
DECODED = CUT | {
    ("gpt_oss", 0),
    ("laguna", 1),
    ("ministral3", 0),
    ("phi3_long", 0),
}


def by(chosen, layers=LAYERS):
    """All layers, those that are not chosen as slow tests."""
    return [
        pytest.param(*layer, marks=[] if layer in chosen else pytest.mark.slow) for layer in layers
    ]


@functools.cache
def model_layers(name):
    model = golden(name)
    return rsj.settings_from_hugging_face(model.config, max_length=model.max_length)


@pytest.mark.usefixtures("one_program_for_all")
@pytest.mark.parametrize(("name", "i"), by(DEFAULT))
def test_whole_and_packed(name, i):
    model = golden(name)
    layer = Layer(model_layers(name), i, model.shapes, seq_axis=None)
    out, gradient = layer.out_and_gradient(jit=lambda f: f)
    assert relative_difference(out, model.out[i]) < TOLERANCE
    assert relative_difference(gradient, model.gradient[i]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "i", "devices"),
    [(*layer, 4) for layer in sorted(CUT)]
    + [pytest.param(*layer, 8, marks=pytest.mark.slow) for layer in LAYERS],
)
def test_cut_over_devices(name, i, devices):
    model = golden(name)
    mesh = jax.make_mesh((devices,), ("seq",), axis_types=(AxisType.Auto,))
    layer = Layer(model_layers(name), i, model.shapes, mesh=mesh)
    out, gradient = layer.out_and_gradient(jit=quick)
    assert relative_difference(out, model.out[i]) < TOLERANCE
    assert relative_difference(gradient, model.gradient[i]) < TOLERANCE


@pytest.mark.parametrize(("name", "i"), by(DECODED))
def test_decoded_token_by_token(name, i):
    model = golden(name)
    layer = Layer(model_layers(name), i, model.shapes, seq_axis=None)
    assert relative_difference(layer.decoded(jit=quick), model.out[i][:1]) < TOLERANCE


def test_there_are_enough():
    types = {golden(name).config["model_type"] for name, _ in DEFAULT}
    assert len(types) >= 25


@pytest.mark.parametrize(("name", "i"), by({("gpt_oss", 0)}, [("gpt_oss", 0), ("afmoe", 0)]))
def test_one_more_key_shows(name, i):
    model = golden(name)
    layers = model_layers(name)
    window = layers.kinds[layers.layers[i]]["window_size"]
    layer = Layer(layers, i, model.shapes, seq_axis=None, window_size=window + 1)
    x, _ = inputs(layer.features)
    out = quick(layer)(layer.parameters, x, SEGMENT_IDS)
    assert relative_difference(out, model.out[i]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_the_same_today(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.ring_swa_jax.hugging_face.small_models import SMALL
    from tests.ring_swa_jax.hugging_face.torch_layers import config_and_results

    model = golden(name)
    _, results = config_and_results(SMALL[name])
    for i, result in results.items():
        np.testing.assert_allclose(result.out, model.out[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result.gradient, model.gradient[i], rtol=1e-4, atol=1e-5)
