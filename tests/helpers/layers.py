"""A Flax layer with all settings, in both frameworks, its parameters and inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import ring_swa_jax as rsj
import ring_swa_jax.linen
import ring_swa_jax.nnx

B, S, E = 2, 16, 24


ALL = dict(
    num_kv_heads=2,
    head_dim=8,
    value_dim=4,
    out_features=20,
    window_size=5,
    num_sink_tokens=2,
    learned_sinks=True,
    logits_soft_cap=20.0,
    scale=0.4,
    qk_norm=True,
    rope=rsj.Rope(500.0, rotary_dim=6),
)


IDS = np.repeat([[3] * 6 + [4] * 9 + [-1]], B, 0)


X = np.random.default_rng(1).standard_normal((B, S, E)).astype(np.float32)


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


CUBE = dict(batch_axis="data", seq_axis="seq", head_axis="model")


# Compiling is most of the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_nnx(num_heads=4, in_features=E, **settings):
    return rsj.nnx.RingSlidingWindowAttention(
        num_heads,
        in_features,
        **{"window_size": 3, "seq_axis": None, "rope": rsj.Rope(), **settings},
        rngs=nnx.Rngs(0),
    )


def make_linen(num_heads=4, **settings):
    return rsj.linen.RingSlidingWindowAttention(
        num_heads, **{"window_size": 3, "seq_axis": None, "rope": rsj.Rope(), **settings}
    )


@functools.cache
def parameters():
    """Random parameters of the layer with all settings, as nested dicts."""
    abstract = nnx.eval_shape(lambda: nnx.state(make_nnx(**ALL), nnx.Param))
    rng = np.random.default_rng(0)
    draw = lambda p: rng.standard_normal(p.shape).astype(np.float32) / 2  # noqa: E731
    return jax.tree.map(draw, nnx.to_pure_dict(abstract))


def through_nnx(settings, method="__call__"):
    """f(parameters, x, **call) by the NNX module."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make_nnx(**settings)))

    def apply(parameters, x, **call):
        state = jax.tree.map(lambda p: p, abstract)
        nnx.replace_by_pure_dict(state, parameters)
        return getattr(nnx.merge(graph, state), method)(x, **call)

    return apply


def through_linen(settings, method=None):
    """The same by the Linen module."""
    module = make_linen(**settings)
    return lambda parameters, x, **call: module.apply(
        {"params": parameters}, x, method=method, **call
    )


FRAMEWORKS = pytest.mark.parametrize("through", [through_nnx, through_linen])


def loss_and_gradients(apply):
    def loss(parameters, x, ids):
        y = apply(parameters, x, segment_ids=ids)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return quick(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@functools.cache
def on_one_device():
    return jax.device_get(loss_and_gradients(through_nnx(ALL))(parameters(), X, IDS))


def assert_close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        jax.device_get(got),
        jax.device_get(want),
    )
