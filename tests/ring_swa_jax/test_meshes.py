"""Meshes that are passed and not set, axes that nobody names, vmap over a mesh axis, few heads."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers.layers import make_linen, make_nnx, quick
from tests.helpers.routes import make_mesh

B, S, N, H = 2, 16, 4, 8
X = jax.random.normal(jax.random.key(0), (B, S, N * H))
IDS = jnp.array([[0] * 6 + [1] * 7 + [-1] * 3] * B)
CUBE = dict(batch_axis="data", head_axis="model")
SETTINGS = dict(num_kv_heads=1, window_size=5, num_sink_tokens=2)


def arrays(kv=N):
    q, k, v = jax.random.normal(jax.random.key(0), (3, B, S, N, H))
    return q, k[:, :, :kv], v[:, :, :kv]


def on(mesh, x, *spec):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec))), x)


def with_gradients(attend):
    def run(*x):
        out, pull = jax.vjp(attend, *x)
        return out, *pull(jnp.cos(out))

    return run


def assert_close(got, want, atol=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(jax.device_get(x), jax.device_get(y), atol=atol)


@pytest.mark.parametrize(
    ("kind", "is_set", "kv"),
    [
        (AxisType.Auto, False, 1),
        (AxisType.Auto, True, 6),
        (AxisType.Explicit, False, 1),
        (AxisType.Explicit, True, 3),
    ],
    ids=str,
)
def test_fewer_key_value_heads_than_devices(kind, is_set, kv):
    """12 query heads over 4 devices; with one head the axis is read where the type of q says it."""
    mesh = make_mesh(kind, seq=2, model=4)
    q, k, v = jax.random.normal(jax.random.key(0), (3, B, S, 12, H))
    x = (q, k[:, :, :kv], v[:, :, :kv])
    options = dict(window_size=5, num_sink_tokens=1, sink_logits=jnp.arange(12.0))
    right = quick(with_gradients(functools.partial(rsj.reference_attention, **options)))(*x)
    read = kind == AxisType.Explicit and kv == 1
    options |= dict(mesh=None if is_set else mesh, head_axis=None if read else "model")
    heads = on(mesh, x[0], None, "seq", "model"), *on(mesh, x[1:], None, "seq")
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        attend = functools.partial(rsj.ring_attention, **options)
        assert_close(quick(with_gradients(attend))(*heads), right)


def test_modules_on_a_mesh_that_is_passed():
    """Called, prefilled and decoding, on Explicit axes that no set_mesh names."""
    mesh = make_mesh(AxisType.Explicit, data=2, seq=2, model=2)
    cut = make_nnx(N, N * H, **SETTINGS, **CUBE, mesh=mesh, seq_axis="seq")
    local = make_nnx(N, N * H, **SETTINGS, **CUBE, mesh=mesh)
    x, rows = on(mesh, X, "data", "seq"), on(mesh, X, "data")

    def decode(module, rows):
        prompt, cache = module.prefill(rows[:, :12])
        return prompt, module.decode(rows[:, 12:], cache)[0]

    def through(function, module):
        graph, state = nnx.split(module)
        return lambda x: function(nnx.merge(graph, state), x)

    call = lambda module, x: module(x, segment_ids=IDS)  # noqa: E731
    whole = make_nnx(N, N * H, **SETTINGS)
    y = quick(through(call, whole))(X)
    assert_close(call(cut, x), y)  # out of jit
    assert_close(quick(through(call, cut))(x), y)
    assert_close(quick(through(decode, local))(rows), quick(through(decode, whole))(X))
    module = make_linen(N, **SETTINGS, **CUBE, mesh=mesh, seq_axis="seq")
    variables = module.init(jax.random.key(0), x)
    alone = quick(make_linen(N, **SETTINGS).apply)(jax.device_get(variables), X)
    assert_close(quick(module.apply)(variables, x), alone)


def test_relative_prefill_with_a_cut_batch():
    settings = dict(window_size=3, num_sink_tokens=2)
    graph, state = nnx.split(make_nnx(2, N * H, **settings))

    def prefill(state, x):
        return nnx.merge(graph, state).prefill(x, relative_positions=True)[0]

    right = quick(prefill)(state, X)
    explicit, auto = make_mesh(AxisType.Explicit, data=2), make_mesh(data=2)
    assert_close(quick(prefill)(state, on(explicit, X, "data")), right)
    shard = jax.shard_map(prefill, in_specs=(P(), P("data")), out_specs=P("data"))
    with jax.set_mesh(auto):
        assert_close(quick(shard)(state, X), right)


STAGED = {
    "window": dict(window_size=40),
    "none": {},
    "sinks": dict(window_size=5, num_sink_tokens=2),
    "ids": dict(window_size=5, num_sink_tokens=2, segment_ids=IDS),
    "learned": dict(window_size=9, sink_logits=jnp.ones(N)),
    "triton": dict(window_size=9, implementation="triton"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "ids" else pytest.mark.slow) for name in STAGED],
)
def test_vmap_with_a_mesh_axis(name):
    """Pipeline stages: the mapped axis is cut over a mesh axis, and nobody is warned of it."""
    options = STAGED[name]
    x = jax.random.normal(jax.random.key(0), (3, 2, B, S, N, 16))
    ring = lambda q, k, v: rsj.ring_attention(q, k, v, **options)  # noqa: E731
    options_of_reference = {k: v for k, v in options.items() if k != "implementation"}
    dense = lambda q, k, v: rsj.reference_attention(q, k, v, **options_of_reference)  # noqa: E731
    right = quick(with_gradients(jax.vmap(dense)))(*x)
    with jax.set_mesh(make_mesh(stage=2, seq=2)), warnings.catch_warnings():
        warnings.simplefilter("error", rsj.RepeatedWorkWarning)
        staged = jax.vmap(ring, spmd_axis_name="stage")
        program = quick(with_gradients(staged)).lower(*on_stages(x)).compile()
    assert_close(program(*on_stages(x)), right)
    if name == "window":  # the stages stay where they are
        assert "all-gather" not in program.as_text()


def on_stages(x):
    return on(make_mesh(stage=2, seq=2), tuple(x), "stage", None, "seq")


def traced(*x, **options):
    return jax.eval_shape(functools.partial(rsj.ring_attention, window_size=5, **options), *x)


def test_axes_that_nobody_names_warn_once():
    mesh = make_mesh(data=2, seq=2, model=2)
    q, k, v = arrays()
    attend = traced
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", rsj.RepeatedWorkWarning)
        for _ in range(3):
            attend(q, k, v, mesh=mesh, batch_axis="data")
            with jax.set_mesh(mesh):
                jax.eval_shape(make_nnx(N, N * H, seq_axis="seq", batch_axis="data"), X)
    (said,) = (str(x.message) for x in caught)
    assert "'model' (of 2 devices)" in said and "head_axis" in said and "'data'" not in said
    with pytest.warns(rsj.RepeatedWorkWarning, match=r"'data' .* 'model'"):
        attend(q, k, v, mesh=mesh)


def test_axes_that_need_no_warning():
    q, k, v = arrays()
    attend = traced
    with warnings.catch_warnings():
        warnings.simplefilter("error", rsj.RepeatedWorkWarning)
        attend(q, k, v, mesh=make_mesh(data=2, seq=2, model=2), **CUBE)
        attend(q, k, v, mesh=make_mesh(data=1, seq=2, model=1))
        attend(q, k, v, mesh=make_mesh(AxisType.Explicit, data=2, seq=2))  # its type says so
        attend(q, k, v, seq_axis=None)
        mesh = make_mesh(data=2, seq=2)
        inside = jax.shard_map(
            functools.partial(rsj.ring_attention, window_size=5),
            axis_names={"data"},
            in_specs=P("data"),
            out_specs=P("data"),
        )
        with jax.set_mesh(mesh):
            jax.eval_shape(inside, q, k, v)
        warnings.simplefilter("ignore", rsj.RepeatedWorkWarning)  # where it is meant
        attend(q, k, v, mesh=mesh)
