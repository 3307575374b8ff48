"""The Flax modules: one layer in two frameworks, on one device and on eight."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
import ring_swa_jax.linen
import ring_swa_jax.nnx
from tests.helpers.layers import (
    ALL,
    CUBE,
    FRAMEWORKS,
    IDS,
    B,
    E,
    S,
    X,
    assert_close,
    loss_and_gradients,
    make_linen,
    make_nnx,
    on_one_device,
    parameters,
    quick,
    through_linen,
    through_nnx,
)
from tests.helpers.routes import make_mesh


def test_equal_outputs_from_equal_parameters():
    assert_close(loss_and_gradients(through_linen(ALL))(parameters(), X, IDS), on_one_device())


def test_every_parameter_and_the_input_get_a_gradient():
    (_, y), gradients = on_one_device()
    assert y.shape == (B, S, 20)
    assert set(gradients[0]) == {
        "query", "key", "value", "out", "query_norm", "key_norm", "sink_logits",
    }  # fmt: skip
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("through", "kind"),
    [
        (through_nnx, AxisType.Explicit),
        pytest.param(through_nnx, AxisType.Auto, marks=pytest.mark.slow),
        pytest.param(through_linen, AxisType.Auto, marks=pytest.mark.slow),
        pytest.param(through_linen, AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
def test_eight_devices(through, kind):
    mesh = make_mesh(kind, data=2, seq=2, model=2)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data", "seq")))
        ids = jax.device_put(IDS, NamedSharding(mesh, P("data", "seq")))
        got = loss_and_gradients(through({**ALL, **CUBE}))(parameters(), x, ids)
        assert got[0][1].sharding.is_equivalent_to(x.sharding, 3)
        assert_close(got, on_one_device())


def test_parameters_cut_over_the_heads():
    """NNX metadata places the parameters; on Explicit axes the module need not name the heads."""
    mesh = make_mesh(AxisType.Explicit, seq=2, model=2)
    metadata = dict(
        kernel_metadata={"out_sharding": (None, "model", None)},
        out_kernel_metadata={"out_sharding": ("model", None, None)},
        bias_metadata={"out_sharding": ("model", None)},
        out_bias_metadata={"out_sharding": (None,)},
        sink_logits_metadata={"out_sharding": ("model",)},
    )
    with jax.set_mesh(mesh):
        zeros = nnx.initializers.zeros_init()
        module = make_nnx(**{**ALL, "seq_axis": "seq"}, **metadata, kernel_init=zeros)
        placed = nnx.to_pure_dict(nnx.state(module, nnx.Param))
        assert placed["query"]["kernel"].sharding.spec == P(None, "model", None)
        assert placed["sink_logits"].sharding.spec == P("model")
        values = jax.tree.map(lambda x, p: jax.device_put(x, p.sharding), parameters(), placed)
        x = jax.device_put(X, NamedSharding(mesh, P(None, "seq")))
        y = quick(through_nnx({**ALL, "seq_axis": "seq"}))(values, x, segment_ids=IDS)
        assert_close(y, on_one_device()[0][1])


def test_logical_partitioning():
    names = ("embed", "heads", "kv")
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("heads",))
    module = make_linen(kernel_init=init, sink_logits_init=zeros, learned_sinks=True)
    variables = jax.eval_shape(module.init, jax.random.key(0), X)
    spec = nn.get_partition_spec(variables)["params"]
    assert spec["query"]["kernel"] == P(*names)
    assert spec["sink_logits"] == P("heads")


@pytest.mark.parametrize(
    "through", [through_nnx, pytest.param(through_linen, marks=pytest.mark.slow)]
)
def test_documents_of_a_pack_do_not_see_each_other(through):
    apply = quick(through(ALL))
    packed = apply(parameters(), X, segment_ids=IDS)
    assert_close(apply(parameters(), X[:, 6:15])[:, :], packed[:, 6:15])
    # A padding token sees nothing: only the bias of the last projection is left.
    assert_close(packed[:, 15], np.broadcast_to(parameters()["out"]["bias"], (B, 20)))


@FRAMEWORKS
def test_positions(through):
    apply = quick(through(ALL))
    plain = apply(parameters(), X)
    count = np.broadcast_to(np.arange(S), (B, S))
    assert_close(apply(parameters(), X, positions=count), plain)
    assert_close(apply(parameters(), X, positions=count + 7), plain)  # distances are the same
    assert np.abs(apply(parameters(), X, positions=3 * count) - plain).max() > 1e-2


def test_window_none_is_full_causal():
    full, wide, narrow = (
        quick(through_nnx({**ALL, "window_size": window}))(parameters(), X)
        for window in (None, S, 2)
    )
    assert_close(full, wide)
    assert np.abs(full - narrow).max() > 1e-2


def test_parameters_are_those_of_flax():
    """A checkpoint of nnx.MultiHeadAttention fits, and without a rotation gives its output."""
    flax = nnx.MultiHeadAttention(4, E, num_kv_heads=2, decode=False, rngs=nnx.Rngs(1))
    settings = dict(num_kv_heads=2, window_size=None, rope=None)
    checkpoint = nnx.to_pure_dict(nnx.state(flax, nnx.Param))
    want = quick(lambda x: flax(x, is_causal=True))(X)
    assert_close(quick(through_nnx(settings))(checkpoint, X), want)
    assert_close(quick(through_linen(settings))(checkpoint, X), want)


@pytest.mark.parametrize("use_out_bias", [None, True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_biases(use_bias, use_out_bias):
    settings = dict(use_bias=use_bias, use_out_bias=use_out_bias)
    both = (
        nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(make_nnx(**settings), nnx.Param))),
        jax.eval_shape(make_linen(**settings).init, jax.random.key(0), X)["params"],
    )
    for params in both:
        assert all(("bias" in params[name]) == use_bias for name in ("query", "key", "value"))
        assert ("bias" in params["out"]) == (use_bias if use_out_bias is None else use_out_bias)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "out"),
    [
        (None, "float32", "float32"),
        (None, "bfloat16", "float32"),  # x is float32
        ("bfloat16", "float32", "bfloat16"),
        ("float16", "bfloat16", "float16"),
    ],
)
def test_dtypes(dtype, param_dtype, out):
    settings = {**ALL, "dtype": dtype, "param_dtype": param_dtype}
    module = make_linen(**settings)
    variables, y = jax.eval_shape(module.init_with_output, jax.random.key(0), X)[::-1]
    assert {str(p.dtype) for p in jax.tree.leaves(variables)} == {param_dtype}
    assert y.dtype == out
    module = nnx.eval_shape(lambda: make_nnx(**settings))
    assert {str(p.dtype) for p in jax.tree.leaves(nnx.state(module, nnx.Param))} == {param_dtype}
    assert nnx.eval_shape(lambda module: module(jnp.asarray(X)), module).dtype == out


def test_bfloat16_is_close_to_float32():
    y = quick(through_nnx({**ALL, "dtype": "bfloat16"}))(parameters(), X, segment_ids=IDS)
    want = on_one_device()[0][1]
    assert np.linalg.norm(np.float32(y) - want) < 2e-2 * np.linalg.norm(want)


def test_norm_over_all_heads_has_a_factor_for_each_feature():
    settings = dict(num_kv_heads=2, window_size=3, qk_norm="all_heads")
    params = nnx.to_pure_dict(nnx.eval_shape(lambda: nnx.state(make_nnx(**settings), nnx.Param)))
    assert params["query_norm"].shape == (4, 6) and params["key_norm"].shape == (2, 6)


@pytest.mark.usefixtures("unchecked_signatures")
@pytest.mark.parametrize(
    ("settings", "error", "shown"),
    [
        (dict(num_heads=5), ValueError, "num_heads=5"),
        (dict(num_heads=4, num_kv_heads=3), ValueError, "num_kv_heads=3"),
        (dict(head_dim=0), ValueError, "head_dim"),
        (dict(window_size=-1), ValueError, "-1"),
        (dict(window_size=2.5), TypeError, "2.5"),
        (dict(num_sink_tokens=-2), ValueError, "-2"),
        (dict(logits_soft_cap=0.0), ValueError, "0.0"),
        (dict(head_dim=7), ValueError, "head_dim=7"),
        (dict(head_dim=8, rope=rsj.Rope(rotary_dim=10)), ValueError, "rotary_dim=10"),
        (dict(rope=10000.0), TypeError, "10000.0"),
        (dict(qk_norm="layer"), ValueError, "layer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_do_not_fit(settings, error, shown):
    for build in (
        lambda: make_nnx(**settings),
        lambda: make_linen(**settings).init(jax.random.key(0), X),
    ):
        with pytest.raises(error) as caught:
            build()
        assert shown in str(caught.value)


@pytest.mark.usefixtures("unchecked_signatures")
@pytest.mark.parametrize(
    ("x", "call", "error", "shown"),
    [
        (X[..., :20], {}, ValueError, "(2, 16, 20)"),
        (X[0], {}, ValueError, "(16, 24)"),
        (X, dict(segment_ids=IDS[:, :7]), ValueError, "(2, 7)"),
        (X, dict(segment_ids=IDS * 0.5), TypeError, "float"),
        (X, dict(positions=IDS[:, :7]), ValueError, "(2, 7)"),
        (X, dict(positions=IDS * 0.5), TypeError, "float"),
    ],
    ids=lambda value: "" if isinstance(value, np.ndarray) else str(value)[:20],
)
def test_calls_that_do_not_fit(x, call, error, shown):
    linen = make_linen(in_features=E)
    for apply in (
        lambda: make_nnx()(x, **call),
        lambda: linen.init(jax.random.key(0), x, **call),
    ):
        with pytest.raises(error) as caught:
            apply()
        assert shown in str(caught.value)


@FRAMEWORKS
def test_a_forgotten_mesh_raises(through):
    with pytest.raises(ValueError, match="set_mesh"):
        jax.eval_shape(through({**ALL, "seq_axis": "seq"}), parameters(), X)


def test_the_package_does_not_import_the_modules():
    code = """
import sys
import ring_swa_jax
assert "ring_swa_jax.nnx" not in sys.modules
assert "flax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
