"""attention_fn in Flax's own modules, as they are."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
import ring_swa_jax.linen
import ring_swa_jax.nnx
from tests.helpers import oracle
from tests.helpers.routes import make_mesh

B, S, E, N = 2, 16, 24, 4
X = np.random.default_rng(1).standard_normal((B, S, E)).astype(np.float32)
SETTINGS = dict(window_size=3, num_sink_tokens=2, logits_soft_cap=10.0, scale=0.5)
WEIGHTS = np.random.default_rng(0).standard_normal((3, 4, B, S, N, 6)).astype(np.float32)

# Compiling is most of the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def parameters():
    shapes = dict(kernel=(E, N, 6), bias=(N, 6))
    rng = np.random.default_rng(2)
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32) / 3  # noqa: E731
    heads = {name: {k: draw(v) for k, v in shapes.items()} for name in ("query", "key", "value")}
    return heads | {"out": {"kernel": draw((N, 6, E)), "bias": draw((E,))}}


def through_nnx(attend, call=None, **settings):
    """f(parameters, x) by nnx.MultiHeadAttention."""
    make = lambda: nnx.MultiHeadAttention(  # noqa: E731
        N, E, attention_fn=attend, decode=False, rngs=nnx.Rngs(0), **settings
    )
    graph, abstract, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def apply(parameters, x):
        state = jax.tree.map(lambda p: p, abstract)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(graph, state, rest)(x, **(call or {}))

    return apply


def through_linen(attend, call=None, **settings):
    """The same by linen.MultiHeadDotProductAttention."""
    module = nn.MultiHeadDotProductAttention(N, attention_fn=attend, **settings)
    return lambda parameters, x: module.apply({"params": parameters}, x, **(call or {}))


FRAMEWORKS = pytest.mark.parametrize(
    ("through", "attention_fn"),
    [(through_nnx, rsj.nnx.attention_fn), (through_linen, rsj.linen.attention_fn)],
    ids=["nnx", "linen"],
)


def expected():
    """Projection, attention and projection in float64."""
    p = jax.tree.map(np.float64, parameters())
    q, k, v = (
        np.einsum("bse,enh->bsnh", X, p[name]["kernel"]) + p[name]["bias"]
        for name in ("query", "key", "value")
    )
    mask = np.stack([oracle.visible(np.zeros(S, int), 3, 2)] * B)
    options = {"scale": 0.5, "logits_soft_cap": 10.0}
    context = oracle.attention(q, k, v, np.zeros_like(q), mask, **options).out
    return np.einsum("bsnh,nhe->bse", context, p["out"]["kernel"]) + p["out"]["bias"]


@FRAMEWORKS
def test_on_one_device(through, attention_fn):
    got = quick(through(attention_fn(**SETTINGS, seq_axis=None)))(parameters(), X)
    np.testing.assert_allclose(got, expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("through", "attention_fn"),
    [
        pytest.param(through_nnx, rsj.nnx.attention_fn, marks=pytest.mark.slow),
        (through_linen, rsj.linen.attention_fn),
    ],
    ids=["nnx", "linen"],
)
def test_over_a_mesh(through, attention_fn):
    mesh = make_mesh(AxisType.Auto, data=2, seq=2, model=2)
    attend = attention_fn(**SETTINGS, batch_axis="data", head_axis="model")
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data", "seq")))
        got = quick(through(attend))(parameters(), x)
    np.testing.assert_allclose(got, expected(), rtol=1e-4, atol=1e-4)


@FRAMEWORKS
def test_dropout_that_is_off(through, attention_fn):
    attend = attention_fn(**SETTINGS, seq_axis=None)
    got = quick(through(attend, dropout_rate=0.5, deterministic=True))(parameters(), X)
    np.testing.assert_allclose(got, expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_causal", [True, False])
def test_causal_whatever_nnx_says(is_causal):
    attend = rsj.nnx.attention_fn(**SETTINGS, seq_axis=None)
    got = quick(through_nnx(attend, {"is_causal": is_causal}))(parameters(), X)
    np.testing.assert_allclose(got, expected(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked_signatures")
@FRAMEWORKS
@pytest.mark.parametrize(
    ("settings", "call", "shown"),
    [
        ({}, {"mask": np.ones((B, N, S, S), bool)}, "mask"),
        ({}, {"sow_weights": True}, "sow_weights"),
        ({"dropout_rate": 0.25}, {"deterministic": False}, "dropout_rate=0.25"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_it_cannot_honour_raises(through, attention_fn, settings, call, shown):
    if "dropout_rate" in settings:
        key = jax.random.key(0)
        call = call | ({"rngs": nnx.Rngs(0)} if through is through_nnx else {"dropout_rng": key})
    apply = through(attention_fn(window_size=3, seq_axis=None), call, **settings)
    with pytest.raises(ValueError, match=shown):
        apply(parameters(), X)


def test_einsums_of_linen_raise():
    for name in ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"):
        attend = rsj.linen.attention_fn(window_size=3, seq_axis=None)
        with pytest.raises(ValueError, match="einsum"):
            through_linen(attend, **{name: lambda: jnp.einsum})(parameters(), X)


def test_a_bias_or_positions_raise():
    attend = rsj.nnx.attention_fn(window_size=3, seq_axis=None)
    q, k, v = WEIGHTS[:, 0]
    with pytest.raises(ValueError, match="bias"):
        attend(q, k, v, bias=np.zeros((B, N, S, S)))
    with pytest.raises(ValueError, match="input_positions"):
        attend(q, k, v, input_positions=np.arange(S))


@pytest.mark.usefixtures("unchecked_signatures")
def test_decoding_with_the_cache_of_flax_raises():
    attend = rsj.nnx.attention_fn(window_size=3, seq_axis=None)
    module = nnx.MultiHeadAttention(N, E, attention_fn=attend, decode=True, rngs=nnx.Rngs(0))
    module.init_cache((B, S, E))
    with pytest.raises(ValueError, match="mask"):
        module(X[:, :1])


def test_any_number_of_batch_dimensions():
    attend = rsj.nnx.attention_fn(window_size=3, seq_axis=None)
    q, k, v = WEIGHTS
    got = attend(q, k, v)
    assert got.shape == q.shape
    one = attend(q[1, 1], k[1, 1], v[1, 1])
    np.testing.assert_allclose(one, got[1, 1], rtol=1e-5, atol=1e-6)


def test_dtype_and_precision():
    attend = rsj.nnx.attention_fn(window_size=3, seq_axis=None)
    q, k, v = WEIGHTS[:, 0]
    in_bfloat16 = functools.partial(attend, dtype=jnp.bfloat16)
    assert jax.eval_shape(in_bfloat16, q, k, v).dtype == jnp.bfloat16
    assert jax.eval_shape(attend, q, k.astype(jnp.bfloat16), v).dtype == jnp.float32

    def program(precision):
        return str(jax.make_jaxpr(functools.partial(attend, precision=precision))(q, k, v))

    assert "HIGHEST" in program(None)
    assert "HIGHEST" in program(jax.lax.Precision.HIGHEST)
    assert "HIGHEST" not in program("high") and "HIGH" in program("high")
    assert "HIGH" not in program((jax.lax.Precision.DEFAULT,) * 2)
    with pytest.raises(ValueError, match="both operands"):
        attend(q, k, v, precision=("high", "highest"))


def test_equal_settings_are_equal_functions():
    """So that a module made anew does not compile anew."""
    make = functools.partial(rsj.nnx.attention_fn, window_size=3)
    assert make() == make() and hash(make()) == hash(make())
    assert make() != make(num_sink_tokens=1)


@pytest.mark.usefixtures("unchecked_signatures")
def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="-1"):
        rsj.nnx.attention_fn(window_size=-1)
    with pytest.raises(TypeError, match=r"2\.5"):
        rsj.linen.attention_fn(window_size=2, num_sink_tokens=2.5)
    with pytest.raises(TypeError, match="dropout_rate"):
        rsj.linen.attention_fn(window_size=2, dropout_rate=0.1)
