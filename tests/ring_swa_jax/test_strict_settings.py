"""Under JAX's strict settings of promotion, of ranks and of dtypes, the programs are the same."""

import contextlib
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from ring_swa_jax import linen
from ring_swa_jax.nnx import RingSlidingWindowAttention, attention_fn
from tests.helpers.routes import make_mesh


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def arrays(dtype, length=8):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, length, 4, 16)).astype(dtype)
    return q, k[:, :, :2], v[:, :, :2]


IDS = jnp.array([[0, 0, 0, 1, 1, 1, -1, -1], [-1, 2, 2, 2, 2, 2, 2, 3]])
LEARNED = jnp.arange(4, dtype=jnp.bfloat16)
ROPE = rsj.Rope(scaling=rsj.YarnScaling(4.0, 64))


def ring(**options):
    return lambda q, k, v: rsj.ring_attention(q, k, v, seq_axis=None, **options)


def cut(**options):
    return lambda q, k, v: rsj.ring_attention(q, k, v, mesh=make_mesh(seq=4), **options)


def per_shard(q, k, v):
    return rsj.ring_streaming_llm_attn(q, k, v, window_size=3, num_sink_tokens=2)


def varlen_on_a_mesh(q, k, v):
    attend = jax.shard_map(
        lambda q, k, v: rsj.ring_streaming_llm_attn_varlen(
            q, k, v, window_size=3, cu_seqlens=jnp.array([0, 3, 7]), axis_name="seq"
        ),
        mesh=make_mesh(seq=4),
        in_specs=P("seq"),
        out_specs=P("seq"),
    )
    return attend(q[0], k[0], v[0])


def reference(q, k, v):
    return rsj.reference_attention(
        q, k, v, window_size=3, num_sink_tokens=1, segment_ids=IDS, sink_logits=LEARNED
    )


def rope(q, k, v):
    positions = rsj.segment_positions(IDS)
    return rsj.apply_rope(q, positions, scaling=ROPE.scaling), rsj.apply_rope(k, jnp.arange(8))


def decoding(q, k, v):
    options = dict(window_size=3, num_sink_tokens=2)
    cache = rsj.prefill_cache(k[:, :4], v[:, :4], segment_ids=IDS[:, :4], **options)
    valid = jnp.array([[True, False], [True, True]])
    options["sink_logits"] = LEARNED
    one, cache = rsj.decode_attention(q[:, 4:5], k[:, 4:5], v[:, 4:5], cache, **options)
    two, cache = rsj.decode_attention(
        q[:, 5:7], k[:, 5:7], v[:, 5:7], cache, valid=valid, **options
    )
    return one, two, rsj.next_positions(cache, 2, valid)


def relative_decoding(q, k, v):
    options = dict(window_size=3, num_sink_tokens=2)
    cache = rsj.init_cache(2, 2, 16, dtype=k.dtype, relative_positions=True, **options)
    rotate = rsj.apply_rope
    out, _ = rsj.decode_attention(q, k, v, cache, rotate=rotate, **options)
    return out


USES = {
    "window": ring(window_size=3),
    "triton": ring(window_size=3, num_sink_tokens=1, segment_ids=IDS, implementation="triton"),
    "everything": ring(
        window_size=3, num_sink_tokens=2, segment_ids=IDS, sink_logits=LEARNED, logits_soft_cap=5.0
    ),
    "no window": ring(),
    "cut": cut(window_size=3, num_sink_tokens=2, segment_ids=IDS, sink_logits=LEARNED),
    "cut, several hops": cut(window_size=5, num_sink_tokens=1),
    "cut, no window": cut(sink_logits=LEARNED),
    "balanced ring": cut(exchange="ring", segment_ids=IDS, sink_logits=LEARNED),
    "both sides": cut(window_size=(1, 2), num_sink_tokens=1, segment_ids=IDS),
    "not causal": cut(window_size=(2, None), num_sink_tokens=1, exchange="ring"),
    "per shard": per_shard,
    "varlen": varlen_on_a_mesh,
    "reference": reference,
    "rope": rope,
}


def operations(function, arrays):
    """All operations of a program, and how many of each, also of the functions that it calls."""
    counted: Counter[str] = Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            results = " ".join(str(x.aval) for x in equation.outvars)
            counted[f"{equation.primitive} {results}"] += 1
            for inner in jaxprs_in_params(equation.params):
                count(inner)

    count(jax.make_jaxpr(function)(*arrays).jaxpr)
    return counted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", USES)
def test_functions_and_their_gradients(name, dtype):
    def run(*x):
        out, pull = jax.vjp(USES[name], *x)
        return out, pull(out)

    x = arrays(dtype)
    expected = operations(run, x)
    with strict():
        assert operations(run, x) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use", [decoding, relative_decoding])
def test_decoding(use, dtype):
    x = arrays(dtype)
    expected = jax.make_jaxpr(use)(*x)
    with strict():
        assert str(jax.make_jaxpr(use)(*x)) == str(expected)


SETTINGS = dict(
    num_kv_heads=2, window_size=3, num_sink_tokens=1, learned_sinks=True, rope=ROPE, seq_axis=None
)


@pytest.mark.parametrize("qk_norm", [False, True, "all_heads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules(dtype, qk_norm):
    options = dict(dtype=dtype, param_dtype=dtype, qk_norm=qk_norm, **SETTINGS)

    def use(x):
        layer = RingSlidingWindowAttention(4, 32, rngs=nnx.Rngs(0), **options)
        y, pull = jax.vjp(lambda x: layer(x, segment_ids=IDS), x)
        prompt, cache = layer.prefill(x[:, :6])
        steps, _ = layer.decode(x[:, 6:], cache)
        module = linen.RingSlidingWindowAttention(4, 32, **options)
        z = module.apply(module.init(jax.random.key(0), x), x, segment_ids=IDS)
        return y, pull(y), prompt, steps, z

    x = jnp.zeros((2, 8, 32), dtype)
    expected = jax.eval_shape(use, x)
    with strict():
        assert jax.eval_shape(use, x) == expected


def test_flax_attention_with_ours():
    attend = attention_fn(window_size=3, seq_axis=None)

    def use(x):
        mine = nnx.MultiHeadAttention(4, 32, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))
        theirs = nn.MultiHeadDotProductAttention(4, attention_fn=attend)
        return mine(x), theirs.init(jax.random.key(0), x)

    with strict():
        jax.eval_shape(use, jnp.zeros((2, 8, 32)))
