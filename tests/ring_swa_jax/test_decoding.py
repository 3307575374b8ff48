"""Decoding with the Flax modules: prompt, then token by token, against a call on the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_swa_jax import _layer_decode
from tests.helpers.layers import (
    ALL,
    IDS,
    B,
    E,
    S,
    X,
    assert_close,
    make_linen,
    make_nnx,
    parameters,
)
from tests.helpers.routes import make_mesh

PROMPT = 7
NO_SINKS = {**ALL, "num_sink_tokens": 0}
GLOBAL = {**ALL, "window_size": None}


# Compiling is most of the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def fitting(settings):
    """Random parameters of a layer with settings like ALL, some of them perhaps left out."""
    absent = {"query_norm", "key_norm"} if not settings.get("qk_norm") else set()
    absent |= {"sink_logits"} if not settings.get("learned_sinks") else set()
    return {name: value for name, value in parameters().items() if name not in absent}


def through_nnx(settings):
    """The NNX module."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make_nnx(**settings)))
    nnx.replace_by_pure_dict(state, fitting(settings))
    return nnx.merge(graph, state)


def through_linen(settings):
    """The Linen module, bound to the same parameters."""
    return make_linen(in_features=E, **settings).bind({"params": fitting(settings)})


FRAMEWORKS = pytest.mark.parametrize("through", [through_nnx, through_linen])


def decode_all(module, cache, x, chunk=1):
    """(output, cache) of all tokens of x, `chunk` at a time, by lax.scan."""

    def step(cache, x):
        y, cache = module.decode(x, cache)
        return cache, y

    x = jnp.asarray(x)
    x = jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, x.shape[2]), 1, 0)
    cache, y = jax.lax.scan(step, cache, x)
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, y.shape[3]), cache


def prompt_and_steps(module, x, prompt=PROMPT, chunk=1, **options):
    """Output for all of x: a prompt at once, the rest by steps."""
    y, cache = module.prefill(x[:, :prompt], **options)
    rest, cache = decode_all(module, cache, x[:, prompt:], chunk)
    return jnp.concatenate([y, rest], 1), cache


def check_steps(module, options, chunk):
    """All in one program, to compile once."""

    @quick
    def both(x):
        return prompt_and_steps(module, x, chunk=chunk, **options)[0], module(x)

    assert_close(*both(X))


@pytest.mark.parametrize(
    ("through", "settings", "options", "chunk"),
    [
        (through_nnx, ALL, {}, 1),
        (through_linen, ALL, {}, 3),
        (through_nnx, GLOBAL, dict(max_length=S), 1),
        (through_linen, GLOBAL, dict(max_length=S), 1),
        (through_linen, {**ALL, "window_size": 0, "learned_sinks": False}, {}, 1),
        (through_nnx, {**NO_SINKS, "qk_norm": False, "rope": None}, {}, 9),
        pytest.param(through_linen, NO_SINKS, dict(max_length=S), 1, marks=pytest.mark.slow),
        pytest.param(through_nnx, {**ALL, "window_size": 40}, {}, 1, marks=pytest.mark.slow),
    ],
    ids=["nnx", "linen", "nnx_global", "linen_global", "window_0", "plain", "no_sinks", "wide"],
)
def test_prompt_and_steps_equal_a_call(through, settings, options, chunk):
    check_steps(through(settings), options, chunk)


@FRAMEWORKS
def test_decoding_goes_on_with_the_last_document(through):
    module = through(ALL)  # documents of 6 and 9 tokens, then padding

    @quick
    def both(x, more):
        y, cache = module.prefill(x, segment_ids=IDS)
        rest, _ = decode_all(module, cache, more)
        alone = module(jnp.concatenate([x[:, 6:15], more], 1))
        return (y, rest), (module(x, segment_ids=IDS), alone[:, 9:])

    assert_close(*both(X, X[:, 4:8]))


def test_endless_stream():
    """From an empty cache, far past all that it holds."""
    module = through_nnx(ALL)
    x = np.random.default_rng(2).standard_normal((1, 90, E)).astype(np.float32)
    cache = module.init_cache(1)
    assert cache.max_length is None and cache.key.shape == (1, 2, 6, 8)

    @quick
    def both(cache, x):
        return *decode_all(module, cache, x), module(x)

    y, after, whole = both(cache, x)
    assert_close(y, whole)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)
    assert after.length.tolist() == [90]


@pytest.mark.parametrize("chunk", [4, pytest.param(128, marks=pytest.mark.slow)])
def test_long_prompt_with_relative_positions(chunk, monkeypatch):
    """At once as token by token, and not as with positions in the sequence."""
    monkeypatch.setattr(_layer_decode, "_CHUNK", chunk)
    module = through_nnx(ALL)

    @quick
    def run(x):
        y, cache = module.prefill(x, relative_positions=True)
        steps, after = decode_all(module, module.init_cache(B, relative_positions=True), x)
        return (y, cache), (steps, after), module(x)

    (y, cache), (steps, after), whole = run(X)
    assert_close(y, steps)
    same = 5 + 2 + 1  # window, sinks and the token itself: nothing has been dropped
    assert_close(y[:, :same], whole[:, :same])
    assert np.abs(y - whole)[:, same:].max() > 1e-2
    assert_close(cache, after)


def test_relative_positions_in_documents():
    module = through_nnx(ALL)
    ids = np.repeat([[0] * 3 + [1] * 12 + [-1]], B, 0)

    @quick
    def run(x):
        packed, cache = module.prefill(x, segment_ids=ids, relative_positions=True)
        first, _ = module.prefill(x[:, :3], relative_positions=True)
        alone, want = module.prefill(x[:, 3:15], relative_positions=True)
        y = module.decode(x[:, :1], cache)[0], module.decode(x[:, :1], want)[0]
        return (packed[:, :15], y[0]), (jnp.concatenate([first, alone], 1), y[1])

    assert_close(*run(X))


def test_a_periodic_stream_with_relative_positions_repeats_itself():
    """Nothing depends on how long ago the sinks were."""
    x = np.tile(X, (1, 4, 1))

    @quick
    def run(x):
        streams = []
        for relative in (True, False):
            module = through_nnx(ALL)
            cache = module.init_cache(B, relative_positions=relative)
            streams.append(decode_all(module, cache, x)[0])
        return streams

    relative, absolute = run(x)
    assert_close(relative[:, 2 * S : 3 * S], relative[:, 3 * S :])
    assert np.abs(absolute[:, 2 * S : 3 * S] - absolute[:, 3 * S :]).max() > 1e-2


def test_relative_positions_matter_to_sinks_alone():
    module = through_nnx(NO_SINKS)
    y, _ = quick(lambda x: prompt_and_steps(module, x, relative_positions=True))(X)
    assert_close(y, quick(module.__call__)(X))


def test_positions_are_for_the_rotation():
    module = through_nnx(ALL)
    count = np.broadcast_to(np.arange(S), (B, S))

    @quick
    def run(x, positions):
        y, cache = module.prefill(x[:, :PROMPT], positions=positions[:, :PROMPT])
        rest, _ = module.decode(x[:, PROMPT:], cache, positions=positions[:, PROMPT:])
        return jnp.concatenate([y, rest], 1), module(x, positions=positions)

    assert_close(*run(X, count + 7))
    assert_close(*run(X, 3 * count))


def test_padding_among_new_tokens():
    module = through_linen(ALL)
    valid = np.array([[True, True, False], [False, True, False]])
    x = np.where(valid[..., None], X[:, PROMPT : PROMPT + 3], np.nan)

    @quick
    def run(whole, x):
        _, cache = module.prefill(whole[:, :PROMPT])
        y, cache = module.decode(x, cache, valid=valid)
        next_y, _ = module.decode(whole[:, :1], cache)
        rows = [jnp.concatenate([whole[i, :PROMPT], x[i][valid[i]], whole[i, :1]]) for i in (0, 1)]
        return y, next_y, [module(row[None])[0, PROMPT:] for row in rows]

    y, next_y, want = run(X, x)
    bias = parameters()["out"]["bias"]
    for row, real in enumerate(valid):
        assert_close(np.concatenate([y[row][real], next_y[row]]), want[row])
        assert_close(y[row][~real], np.broadcast_to(bias, y[row][~real].shape))


@pytest.mark.parametrize(
    ("through", "kind"),
    [
        (through_nnx, AxisType.Explicit),
        (through_linen, AxisType.Auto),
        pytest.param(through_nnx, AxisType.Auto, marks=pytest.mark.slow),
        pytest.param(through_linen, AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
def test_a_prompt_cut_over_devices(through, kind):
    mesh = make_mesh(kind, data=2, seq=2)
    cut = {**ALL, "seq_axis": "seq", "batch_axis": "data"}
    want = quick(through_nnx(ALL).__call__)(X)
    with jax.set_mesh(mesh):
        module = through(cut)

        @quick
        def run(x, more):
            y, cache = module.prefill(x)
            return y, *decode_all(module, cache, more)

        x = jax.device_put(X[:, :8], NamedSharding(mesh, P("data", "seq")))
        more = jax.device_put(X[:, 8:], NamedSharding(mesh, P("data")))
        y, rest, cache = run(x, more)
        assert y.sharding.is_equivalent_to(x.sharding, 3)
        if kind == AxisType.Explicit:
            assert cache.key.sharding.spec[0] == "data"
    assert_close(np.concatenate([y, rest], 1), want)


@pytest.mark.parametrize(("dtype", "param_dtype"), [("bfloat16", "float32"), (None, "bfloat16")])
def test_the_cache_has_the_dtype_of_the_keys(dtype, param_dtype):
    settings = {**ALL, "dtype": dtype, "param_dtype": param_dtype}
    linen = make_linen(in_features=E, **settings)
    variables = jax.eval_shape(linen.init, jax.random.key(0), X)
    x = jnp.asarray(X, "bfloat16")
    apply = functools.partial(linen.apply, method="decode")
    y, cache = jax.eval_shape(apply, variables, x, linen.init_cache(B))
    assert y.dtype == cache.key.dtype == cache.sink_value.dtype == jnp.bfloat16
    module = nnx.eval_shape(lambda: make_nnx(**settings))
    y, cache = nnx.eval_shape(lambda m: m.decode(x, m.init_cache(B)), module)
    assert y.dtype == cache.key.dtype == jnp.bfloat16


def raises(error, message, call, *args, **options):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: call(*args, **options))


@pytest.mark.usefixtures("unchecked_signatures")
@FRAMEWORKS
def test_errors(through):
    module, full = through(ALL), through(GLOBAL)
    cache, relative = module.init_cache(B), module.init_cache(B, relative_positions=True)
    decode, prefill = module.decode, module.prefill
    x, positions = X[:, :2], np.zeros((B, 2), np.int32)
    raises(ValueError, "max_length", full.init_cache, B)
    raises(ValueError, "max_length", full.prefill, X)
    raises(ValueError, "16 .* max_length=4", prefill, X, max_length=4, relative_positions=True)
    honoured = r"positions \(2, 2\) cannot be honoured"
    raises(ValueError, honoured, prefill, x, positions=positions, relative_positions=True)
    raises(ValueError, honoured, decode, x, relative, positions=positions)
    raises(ValueError, r"\(2, 2, 20\)", decode, x[..., :20], cache)
    raises(ValueError, "window_size=5, .* None", decode, x, full.init_cache(B, max_length=9))
    raises(ValueError, r"valid .* \(2, 2\)", decode, x, cache, valid=np.ones((B, 3), bool))
    raises(TypeError, "valid must be boolean", decode, x, cache, valid=positions)
    raises(TypeError, "NoneType", decode, x, None)
    raises(TypeError, "bfloat16", decode, x, module.init_cache(B, dtype="bfloat16"))


def test_a_long_relative_prompt_that_is_cut_raises():
    prefill = functools.partial(
        through_nnx({**ALL, "seq_axis": "seq"}).prefill, relative_positions=True
    )
    with jax.set_mesh(make_mesh(seq=2)):
        jax.eval_shape(prefill, X[:, :8])
        raises(ValueError, "more than .* = 8, .* cuts it over 2 devices", prefill, X[:, :10])
    raises(ValueError, "set_mesh", prefill, X[:, :10])


def test_linen_init_cache_needs_the_size_of_heads():
    with pytest.raises(ValueError, match="in_features or head_dim"):
        make_linen().init_cache(B)
    assert make_linen(head_dim=6).init_cache(B).key.shape == (B, 4, 4, 6)
    assert make_linen(in_features=E).init_cache(B).key.shape == (B, 4, 4, 6)
