"""Options of a layer, each against plain NumPy in float64, whole, packed and decoded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj
from tests.helpers import oracle
from tests.helpers.layers import E, make_linen, make_nnx, quick, through_linen, through_nnx
from tests.helpers.one_program import one_program_for_all  # noqa: F401  a fixture

BASE = dict(num_kv_heads=2, head_dim=8, window_size=5, rope=rsj.Rope(500.0))
IDS = np.array([[0] * 16, [3] * 6 + [4] * 9 + [-1]])
X = np.random.default_rng(5).standard_normal((*IDS.shape, E)).astype(np.float32)
LONG = rsj.LongRopeScaling((1.0, 1.5, 2.0, 4.0), 1.2)
OPTIONS = {
    "elementwise_gate": dict(output_gate="elementwise", value_dim=4),
    "headwise_softplus_gate": dict(
        output_gate="headwise", output_gate_activation="softplus", use_bias=False
    ),
    "value_norm": dict(value_norm=True, qk_norm_epsilon=0.1),
    "context_norm": dict(context_norm=True, qk_norm_epsilon=0.1),
    "norm_before": dict(qk_norm=True),
    "norm_after": dict(qk_norm=True, qk_norm_after_rope=True),
    "norm_of_all_heads_after": dict(qk_norm="all_heads", qk_norm_after_rope=True),
    "norm_without_factor": dict(qk_norm=True, qk_norm_scale=False, qk_norm_epsilon=0.1),
    "query_scaling": dict(query_scaling=rsj.QueryScaling(0.7, 3, offset=1)),
    "longrope": dict(rope=rsj.Rope(500.0, scaling=LONG)),
    "yarn_mscale": dict(
        rope=rsj.Rope(500.0, scaling=rsj.YarnScaling(4.0, 8, mscale=2.0, mscale_all_dim=0.5))
    ),
    "proportional": dict(rope=rsj.Rope(500.0, scaling=rsj.ProportionalScaling(0.6, 2.0))),
    "key_as_value": dict(key_as_value=True, value_norm=True, qk_norm=True),
    "chunks": dict(window_size=None, attention_chunk_size=4),
}


def frequencies(rope):
    """(of the four pairs, factor of the rotated features)."""
    theta = rope.base ** (-np.arange(4) / 4)
    scaling = rope.scaling
    if isinstance(scaling, rsj.LongRopeScaling):
        return theta / np.array(scaling.factors), scaling.attention_factor
    if isinstance(scaling, rsj.ProportionalScaling):
        return np.where(np.arange(4) < int(scaling.fraction * 4), theta / scaling.factor, 0), 1.0
    if isinstance(scaling, rsj.YarnScaling):
        # 8 theta / 2 pi turns are less than beta_fast=32 everywhere, and beta_slow=1 at m = 0.155
        kept = np.clip(1 - np.arange(4) / 1, 0, 1)
        m = [0.1 * a * np.log(4.0) + 1 for a in (scaling.mscale, scaling.mscale_all_dim)]
        return theta * kept + theta / 4.0 * (1 - kept), m[0] / m[1]
    return theta, 1.0


def rotate(x, positions, rope):
    theta, factor = frequencies(rope)
    numbers = (
        (x[..., :4] + 1j * x[..., 4:]) * factor * np.exp(1j * positions[..., None, None] * theta)
    )
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def rms_norm(x, epsilon, factor=1.0, axes=-1):
    return x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + epsilon) * factor


def turned(x, positions, factor, settings):
    epsilon = settings.get("qk_norm_epsilon", 1e-6)
    axes = (-2, -1) if settings.get("qk_norm") == "all_heads" else -1
    steps = [lambda x: rotate(x, positions, settings["rope"])]
    if settings.get("qk_norm"):
        after = settings.get("qk_norm_after_rope", False)
        steps.insert(after, lambda x: rms_norm(x, epsilon, factor, axes))
    for step in steps:
        x = step(x)
    return x


def dense(parameters, x, ids, settings):
    """The layer's output, from its formulas."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)

    def project(name):
        kernel, bias = p[name]["kernel"], p[name].get("bias", 0)
        return np.einsum("bse,enh->bsnh", x, kernel) + bias

    starts = np.stack([oracle.starts_from_segment_ids(row) for row in ids])
    positions = np.where(starts < 0, 0, np.arange(x.shape[1]) - starts)
    q = turned(project("query"), positions, p.get("query_norm", 1.0), settings)
    k = turned(project("key"), positions, p.get("key_norm", 1.0), settings)
    if "query_scaling" in settings:
        s = settings["query_scaling"]
        factor = 1 + s.beta * np.log(1 + np.floor((positions + s.offset) / s.original_length))
        q = q * factor[..., None, None]
    v = project("key" if settings.get("key_as_value") else "value")
    epsilon = settings.get("qk_norm_epsilon", 1e-6)
    if settings.get("value_norm"):
        v = rms_norm(v, epsilon)
    mask = np.stack([oracle.visible(row, settings["window_size"]) for row in starts])
    if chunk := settings.get("attention_chunk_size"):
        mask &= (positions[:, :, None] // chunk) == (positions[:, None] // chunk)
    nothing = np.zeros((*q.shape[:3], v.shape[-1]))
    context = oracle.attention(q, k, v, nothing, mask).out
    if settings.get("context_norm"):
        context = rms_norm(context, epsilon)
    if "output_gate" in settings:
        gate = project("gate")
        soft = settings.get("output_gate_activation") == "softplus"
        context = context * (np.log1p(np.exp(gate)) if soft else 1 / (1 + np.exp(-gate)))
    return np.einsum("bsnh,nhe->bse", context, p["out"]["kernel"]) + p["out"].get("bias", 0)


def parameters_of(settings):
    """Random ones; none is a silent zero or one."""
    module = make_linen(**settings)
    kv = None
    if settings.get("kv_shared"):
        kv = (jnp.zeros((*IDS.shape, settings["num_kv_heads"], settings["head_dim"])),) * 2
    init = functools.partial(module.init, shared_kv=kv)
    tree = jax.eval_shape(init, jax.random.key(0), X)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32) / 2, tree)


@pytest.mark.usefixtures("one_program_for_all")
@pytest.mark.parametrize("option", OPTIONS)
def test_whole_and_packed(option):
    settings = BASE | OPTIONS[option]
    parameters = parameters_of(settings)
    out = through_linen(settings)(parameters, X, segment_ids=IDS)
    want = dense(parameters, X, IDS, settings)
    real = IDS >= 0
    np.testing.assert_allclose(out[real], want[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
def test_decoded_in_two_steps(option):
    settings = BASE | OPTIONS[option]
    parameters = parameters_of(settings)
    module = make_linen(**settings)
    want = dense(parameters, X, np.zeros_like(IDS), settings)

    @quick
    def step(cache, x):
        return module.apply({"params": parameters}, x, cache, method="decode")

    first, cache = step(module.init_cache(len(X), max_length=X.shape[1]), X[:, :8])
    second, _ = step(cache, X[:, 8:])
    out = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("one_program_for_all")
@pytest.mark.parametrize(
    "option",
    [
        "chunks",
        *(
            pytest.param(option, marks=pytest.mark.slow)
            for option in ("headwise_softplus_gate", "elementwise_gate")
        ),
    ],
)
def test_prefill_goes_on_with_the_last_document(option):
    settings = BASE | OPTIONS[option]
    parameters = parameters_of(settings)
    variables, module = {"params": parameters}, make_linen(**settings)
    ids = np.array([[0] * 10, [3] * 4 + [4] * 6])
    _, cache = module.apply(variables, X[:, :10], segment_ids=ids, max_length=16, method="prefill")
    y, _ = module.apply(variables, X[:, 10:11], cache, method="decode")
    whole = np.concatenate([ids, ids[:, -1:]], axis=1)
    want = dense(parameters, X[:, :11], whole, settings)[:, 10:]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("one_program_for_all")
@pytest.mark.parametrize(
    "option", ["elementwise_gate", "norm_without_factor", "key_as_value", "query_scaling"]
)
def test_nnx_has_the_same_parameters_and_results(option):
    settings = BASE | OPTIONS[option]
    parameters = parameters_of(settings)
    want = through_linen(settings)(parameters, X, segment_ids=IDS)
    out = through_nnx(settings)(parameters, X, segment_ids=IDS)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


SHARED = BASE | dict(kv_shared=True, qk_norm=True)
OWN = BASE | dict(qk_norm=True)


def shared_pair():
    """(parameters of a layer, of a later one that takes its keys), the later one's whole set."""
    own = parameters_of(OWN)
    later = parameters_of(SHARED)
    return own, later, {**own, **later}


@pytest.mark.usefixtures("one_program_for_all")
@pytest.mark.parametrize("through", [through_nnx, through_linen])
def test_keys_and_values_of_an_earlier_layer(through):
    own, later, whole = shared_pair()
    assert set(later) == {"query", "query_norm", "out"}
    kv = through(OWN, "keys_values")(own, X, segment_ids=IDS)
    out = through(SHARED)(later, X, segment_ids=IDS, shared_kv=kv)
    want = dense(whole, X, IDS, OWN)
    real = IDS >= 0
    np.testing.assert_allclose(out[real], want[real], rtol=1e-4, atol=1e-4)


def test_decoding_with_keys_of_an_earlier_layer():
    own, later, whole = shared_pair()
    first, second = make_linen(**OWN), make_linen(**SHARED)

    @quick
    def step(cache, x):
        kv = first.apply({"params": own}, x, cache=cache, method="keys_values")
        _, after = first.apply({"params": own}, x, cache, method="decode")
        y, same = second.apply({"params": later}, x, cache, shared_kv=kv, method="decode")
        assert same is cache
        return y, after

    y1, cache = step(first.init_cache(len(X)), X[:, :8])
    y2, _ = step(cache, X[:, 8:])
    want = dense(whole, X, np.zeros_like(IDS), OWN)
    np.testing.assert_allclose(np.concatenate([y1, y2], axis=1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(output_gate="both"), "output_gate.*headwise.*'both'"),
        (dict(output_gate="headwise", output_gate_activation="relu"), "activation.*'relu'"),
        (dict(attention_chunk_size=4), "window_size=None.*not with 3"),
        (dict(attention_chunk_size=0, window_size=None), "attention_chunk_size.*0"),
        (dict(key_as_value=True, value_dim=4), "value_dim=4 and head_dim=6"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        make_nnx(**settings)


@pytest.mark.usefixtures("unchecked_signatures")
def test_query_scaling_of_another_type():
    with pytest.raises(TypeError, match=r"QueryScaling or None, got 0\.1"):
        make_nnx(query_scaling=0.1)


def test_a_layer_without_keys_asks_for_them():
    layer = make_nnx(kv_shared=True)
    with pytest.raises(ValueError, match=r"keys_values\(x.*kv_shared=True and shared_kv=None"):
        layer(X)
    with pytest.raises(ValueError, match="no cache to fill"):
        layer.prefill(X)
    own = make_nnx()
    with pytest.raises(ValueError, match="kv_shared=False and shared_kv=keys"):
        own(X, shared_kv=own.keys_values(X))


@pytest.mark.parametrize("option", ["query_scaling", "norm_after"])
def test_cache_relative_positions_cannot_be_honoured(option):
    layer = make_nnx(**BASE | OPTIONS[option])
    cache = layer.init_cache(2, relative_positions=True)
    with pytest.raises(ValueError, match="relative_positions=False"):
        layer.decode(X[:, :1], cache)


def test_longrope_with_too_few_factors():
    with pytest.raises(ValueError, match="4 factors, but 3 pairs"):
        make_nnx(rope=rsj.Rope(scaling=LONG))(X)


def test_chunk_ids():
    ids = rsj.chunk_segment_ids(jnp.array([[7] * 5 + [2] * 4 + [-1]]), 3)
    np.testing.assert_array_equal(ids, [[0, 0, 0, 3, 3, 5, 5, 5, 8, -1]])


def test_decode_attention_wants_a_window_that_holds_a_chunk():
    q = jnp.zeros((1, 1, 2, 4))
    cache = rsj.init_cache(1, 2, 4, window_size=2)
    with pytest.raises(ValueError, match="attention_chunk_size=4 goes with window_size=3"):
        rsj.decode_attention(q, q, q, cache, window_size=2, attention_chunk_size=4)
