"""Calls outside of jit compile in their first time alone."""

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring

import ring_swa_jax as rsj
from tests.helpers.layers import make_linen, make_nnx

pytestmark = pytest.mark.usefixtures("unchecked_signatures")

COMPILATION = "/jax/core/compile/backend_compile_duration"
compilations = 0


def _count(event, duration, **_):
    global compilations
    compilations += event == COMPILATION


monitoring.register_event_duration_secs_listener(_count)

Q, K, V = jax.random.normal(jax.random.key(0), (3, 1, 12, 2, 8))
X = jax.random.normal(jax.random.key(0), (1, 12, 16))
IDS = jnp.array([[0] * 7 + [1] * 5])
OPTIONS = dict(window_size=3, num_sink_tokens=2)


def gradient(attend):
    return jax.grad(lambda q: attend(q, K, V).sum())(Q)


def layer(**settings):
    return make_nnx(2, 16, **settings, **OPTIONS)


def decode():
    cache = rsj.prefill_cache(K, V, **OPTIONS)
    return rsj.decode_attention(Q[:, :2], K[:, :2], V[:, :2], cache, **OPTIONS)


LAYER, LINEN = layer(), make_linen(2, in_features=16, **OPTIONS)
VARIABLES = LINEN.init(jax.random.key(0), X)
CALLS = {
    "ring_attention": lambda: rsj.ring_attention(
        Q, K, V, segment_ids=IDS, seq_axis=None, **OPTIONS
    ),
    "ring_sliding_window_attn": lambda: rsj.ring_sliding_window_attn(Q, K, V, window_size=3),
    "ring_streaming_llm_attn_varlen": lambda: rsj.ring_streaming_llm_attn_varlen(
        Q[0], K[0], V[0], cu_seqlens=[0, 5, 12], **OPTIONS
    ),
    "gradient": lambda: gradient(lambda q, k, v: rsj.ring_streaming_llm_attn(q, k, v, **OPTIONS)),
    "reference_attention": lambda: rsj.reference_attention(Q, K, V, segment_ids=IDS, **OPTIONS),
    "apply_rope": lambda: rsj.apply_rope(Q, rsj.segment_positions(IDS)),
    "decode_attention": decode,
    "layer": lambda: LAYER(X),
    "relative prefill": lambda: LAYER.prefill(X, relative_positions=True),
    "linen layer": lambda: LINEN.apply(VARIABLES, X),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_compiles_nothing(name):
    jax.clear_caches()  # JAX forgets programs once it has some thousands of them
    CALLS[name]()
    before = compilations
    CALLS[name]()
    assert compilations == before


def test_the_count_sees_compilations():
    before = compilations
    jax.jit(lambda x: x + 3.25)(1.0)
    assert compilations > before
