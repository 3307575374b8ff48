"""Each model's layers, scaled down, against a dense float64 computation in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ring_swa_jax as rsj
from ring_swa_jax.nnx import RingSlidingWindowAttention
from tests.helpers import oracle
from tests.helpers.models import MODELS

# These have every setting; the other layers differ in numbers, or in the window alone.
DIFFERENT = {
    ("gemma2_9b", "local"),
    ("gemma3_27b", "global"),
    ("gpt_oss_20b", "local"),
    ("mimo_v2_flash", "local"),
    ("olmo3_32b", "global"),
    ("command_a", "local"),
    ("command_a", "global"),
}
KINDS = [
    pytest.param(model, kind, marks=[] if (model, kind) in DIFFERENT else pytest.mark.slow)
    for model, layers in rsj.models.items()
    for kind in layers.kinds
    if model != "gpt_oss_120b"  # it has the layers of gpt_oss_20b, as tested below
]
IDS = np.array([[0] * 9 + [1] * 13 + [-1] * 2, [5] * 24])
# Of the names in the table of the design, where they differ.
IN_TABLE = {"gpt_oss_20b": "gpt_oss", "gpt_oss_120b": "gpt_oss"}


def scaled_down(settings):
    """The same ratios of heads and of head sizes, with a window that cuts off something."""
    small = dict(settings)
    heads = math.gcd(settings["num_heads"], settings["num_kv_heads"])
    small["num_heads"] = settings["num_heads"] // heads * 2
    small["num_kv_heads"] = 2
    small["in_features"] = 20
    small["head_dim"] = settings["head_dim"] // 8
    if "value_dim" in settings:
        small["value_dim"] = settings["value_dim"] // 8
    rope = settings["rope"]
    if rope is not None and rope.rotary_dim is not None:
        small["rope"] = dataclasses.replace(rope, rotary_dim=rope.rotary_dim // 8)
    if settings["window_size"] is not None:
        small["window_size"] = 6
    return small


def frequencies(rope, dim):
    """Of the pairs of `dim` features, from the formulas of the papers."""
    m = np.arange(dim // 2)
    theta = rope.base ** (-2.0 * m / dim)
    if isinstance(rope.scaling, rsj.LinearScaling):
        return theta / rope.scaling.factor, 1.0
    if rope.scaling is None:
        return theta, 1.0
    yarn = rope.scaling

    def index_with(turns):
        # theta(m) L / 2 pi = turns, solved for m
        wavelength = yarn.original_length / turns
        return dim / 2 * np.log(wavelength / (2 * np.pi)) / np.log(rope.base)

    low, high = index_with(yarn.beta_fast), index_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    extrapolated = 1 - np.clip((m - low) / (high - low), 0, 1)
    blended = theta / yarn.factor * (1 - extrapolated) + theta * extrapolated
    factor = yarn.attention_factor
    return blended, 0.1 * np.log(yarn.factor) + 1 if factor is None else factor


def rotate(x, positions, rope):
    """As complex numbers: multiplied by exp(i p theta)."""
    if rope is None:
        return x
    dim = rope.rotary_dim or x.shape[-1]
    theta, magnitude = frequencies(rope, dim)
    pairs = (np.arange(0, dim, 2), np.arange(1, dim, 2))
    if not rope.interleaved:
        pairs = (np.arange(dim // 2), np.arange(dim // 2) + dim // 2)
    numbers = x[..., pairs[0]] + 1j * x[..., pairs[1]]
    numbers = numbers * magnitude * np.exp(1j * positions[:, :, None, None] * theta)
    y = x.copy()
    y[..., pairs[0]], y[..., pairs[1]] = numbers.real, numbers.imag
    return y


def normalise(x, factor, settings):
    """RMSNorm of every head, or of all heads together."""
    if not settings.get("qk_norm"):
        return x
    axes = (2, 3) if settings["qk_norm"] == "all_heads" else 3
    square = (x**2).mean(axis=axes, keepdims=True)
    return x / np.sqrt(square + settings["qk_norm_epsilon"]) * factor


def dense(x, parameters, settings, segment_ids):
    """The layer's output, from its formulas."""
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    q, k, v = (
        np.einsum("bse,enh->bsnh", x, p[f"{name}.kernel"]) + p.get(f"{name}.bias", 0)
        for name in ("query", "key", "value")
    )
    starts = np.stack([oracle.starts_from_segment_ids(row) for row in segment_ids])
    positions = np.where(starts < 0, 0, np.arange(x.shape[1]) - starts)
    q = rotate(normalise(q, p.get("query_norm"), settings), positions, settings["rope"])
    k = rotate(normalise(k, p.get("key_norm"), settings), positions, settings["rope"])
    mask = np.stack([oracle.visible(row, settings["window_size"]) for row in starts])
    context = oracle.attention(
        q,
        k,
        v,
        np.zeros((*q.shape[:3], v.shape[-1])),
        mask,
        scale=settings.get("scale"),
        logits_soft_cap=settings.get("logits_soft_cap"),
        sink_logits=p.get("sink_logits"),
    ).out
    return np.einsum("bsnh,nhe->bse", context, p["out.kernel"]) + p.get("out.bias", 0)


@pytest.mark.parametrize(("model", "kind"), KINDS, ids=lambda name: name)
def test_layer_is_the_dense_computation(model, kind):
    settings = scaled_down(rsj.layer_settings(model).kinds[kind])
    rng = np.random.default_rng(0)
    graph, abstract = nnx.split(
        nnx.eval_shape(
            lambda: RingSlidingWindowAttention(**settings, seq_axis=None, rngs=nnx.Rngs(0))
        )
    )
    # No parameter is a silent zero or one.
    parameters = {
        path: rng.standard_normal(parameter.shape) * (0.3 if path[-1] == "kernel" else 1)
        for path, parameter in nnx.to_flat_state(abstract)
    }
    x = rng.standard_normal((*IDS.shape, settings["in_features"]))

    @jax.jit
    def layer(parameters, x):
        state = nnx.to_flat_state(abstract)
        state = [(path, p.replace(parameters[path])) for path, p in state]
        return nnx.merge(graph, nnx.from_flat_state(state))(x, segment_ids=jnp.asarray(IDS))

    arguments = jax.tree.map(lambda x: np.asarray(x, np.float32), (parameters, x))
    # Compiling is most of the time.
    out = layer.lower(*arguments).compile({"xla_backend_optimization_level": 0})(*arguments)
    named = {".".join(path): value for path, value in parameters.items()}
    np.testing.assert_allclose(out, dense(x, named, settings, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", rsj.models)
def test_settings_are_those_of_the_design(model):
    layers = rsj.layer_settings(model)
    record = MODELS[IN_TABLE.get(model, model)]
    local = layers.kinds["local"]
    assert local["window_size"] == record.window
    assert (local["num_heads"], local["num_kv_heads"]) == record.heads
    assert (local["head_dim"], local.get("value_dim", local["head_dim"])) == record.dims
    assert local.get("logits_soft_cap") == record.softcap
    assert local.get("learned_sinks", False) == record.learned
    assert all(
        kind["window_size"] is None for name, kind in layers.kinds.items() if name != "local"
    )
    assert layers.source.startswith("https://")


RATIOS = {"gemma2": 1, "gpt_oss": 1, "gemma3": 5, "olmo3": 3, "command": 3}


@pytest.mark.parametrize("model", rsj.models)
def test_pattern(model):
    layers = rsj.layer_settings(model)
    ratio = next((n for name, n in RATIOS.items() if model.startswith(name)), None)
    assert len(layers.layers) == layers.num_layers
    assert set(layers.layers) == set(layers.kinds)
    if ratio is not None:
        assert layers.layers == tuple(
            "global" if i % (ratio + 1) == ratio else "local" for i in range(layers.num_layers)
        )


def test_pattern_of_mimo_begins_and_ends_with_a_global_layer():
    layers = rsj.layer_settings("mimo_v2_flash").layers
    at = [i for i, kind in enumerate(layers) if kind == "global"]
    assert at == [0, 5, 11, 17, 23, 29, 35, 41, 47]


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match="gemma3_4b"):
        rsj.layer_settings("gemma9")


def test_the_two_gpt_oss_have_the_same_layers():
    assert rsj.layer_settings("gpt_oss_20b").kinds == rsj.layer_settings("gpt_oss_120b").kinds


def test_settings_of_one_call_are_not_those_of_the_next():
    rsj.layer_settings("mistral_7b").kinds["local"]["window_size"] = 3
    assert rsj.layer_settings("mistral_7b").kinds["local"]["window_size"] == 4095
