"""What is refused says in one sentence what is taken."""

import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj
from tests.helpers.layers import make_nnx

pytestmark = pytest.mark.usefixtures("unchecked_signatures")

Q, K = np.ones((1, 8, 4, 16), np.float32), np.ones((1, 8, 2, 16), np.float32)
FLOATS = "float16, bfloat16, float32 or float64"
USES = {
    "ring_attention": lambda q, k, **o: rsj.ring_attention(q, k, k, seq_axis=None, **o),
    "per shard": lambda q, k, **o: rsj.ring_sliding_window_attn(q, k, k, **{"window_size": 3, **o}),
    "varlen": lambda q, k, **o: rsj.ring_sliding_window_attn_varlen(
        q[0], k[0], k[0], cu_seqlens=[0, 8], **{"window_size": 3, **o}
    ),
    "reference": lambda q, k, **o: rsj.reference_attention(q, k, k, **o),
    "prefill_cache": lambda q, k, **o: rsj.prefill_cache(k, k, **{"window_size": 3, **o}),
}
EVERY = pytest.mark.parametrize("name", USES)


@EVERY
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "int32", "bool"])
def test_dtypes(name, dtype):
    with pytest.raises(TypeError, match=f"{FLOATS}, got {dtype}"):
        USES[name](jnp.asarray(Q).astype(dtype), jnp.asarray(K).astype(dtype))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int32"])
def test_dtypes_of_rope_and_caches(dtype):
    with pytest.raises(TypeError, match=f"{FLOATS}, got {dtype}"):
        rsj.apply_rope(jnp.asarray(Q).astype(dtype), jnp.arange(8))
    with pytest.raises(TypeError, match=f"{FLOATS}, got {dtype}"):
        rsj.init_cache(1, 2, 16, window_size=3, dtype=dtype)


@EVERY
def test_lists_are_arrays_and_other_things_are_not(name):
    USES[name](Q.tolist() if name != "varlen" else Q, K.tolist() if name != "varlen" else K)
    if name != "varlen":
        with pytest.raises(TypeError, match="must be an array, got"):
            USES[name]("q", "k")
        with pytest.raises(TypeError, match="must be an array, got list"):
            USES[name]([[1.0], [2.0, 3.0]], [[1.0], [2.0, 3.0]])


def test_vectors():
    with pytest.raises(ValueError, match=r"shape \[B, T, N, H\]"):
        rsj.ring_attention(Q[0, 0, 0], K[0, 0, 0], K[0, 0, 0], seq_axis=None)
    with pytest.raises(ValueError, match=r"\[B, S\] = \(1, 8\), got \(8,\)"):
        rsj.ring_attention(Q, K, K, segment_ids=[0] * 8, seq_axis=None)
    with pytest.raises(ValueError, match=r"vector .* got shape \(1, 2\)"):
        rsj.ring_sliding_window_attn_varlen(Q[0], K[0], K[0], window_size=3, cu_seqlens=[[0, 8]])
    with pytest.raises(TypeError, match="segment_ids must be an array, got list"):
        rsj.ring_attention(Q, K, K, segment_ids=[[0] * 8, [1]], seq_axis=None)
    with pytest.raises(TypeError, match="sink_logits must be an array, got str"):
        rsj.ring_attention(Q, K, K, sink_logits="one", seq_axis=None)
    with pytest.raises(TypeError, match="x must be an array, got str"):
        make_nnx()("x")


@EVERY
@pytest.mark.parametrize("window", [-1, (-1, 0), (-1, -1), (5, -1), np.int64(-1)], ids=str)
def test_minus_one(name, window):
    with pytest.raises(ValueError, match="writes as -1, write None"):
        USES[name](Q, K, window_size=window)


@EVERY
def test_pairs(name):
    options = {"max_length": 8} if name == "prefill_cache" else {}
    for pair, window in (((3, 0), 3), ([3, 0], 3), ((None, 0), None)):
        got = USES[name](Q, K, window_size=pair, **options)
        want = USES[name](Q, K, window_size=window, **options)
        if name != "prefill_cache":
            np.testing.assert_array_equal(got, want)
    if name == "prefill_cache":
        for pair in ((3, 3), (None, None), (None, 2)):
            with pytest.raises(ValueError, match="must not reach past the query"):
                USES[name](Q, K, window_size=pair)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\)"):
        USES[name](Q, K, window_size=(1, 2, 3))


def test_heads_before_the_length():
    q, k = np.swapaxes(Q, 1, 2), np.swapaxes(K, 1, 2)
    with pytest.raises(ValueError, match=r"go through jnp\.swapaxes\(x, -3, -2\)"):
        rsj.ring_attention(q, k, k, seq_axis=None)
    longer = np.ones((1, 2, 12, 16), np.float32)  # fewer heads before a longer row
    with pytest.raises(ValueError, match=r"jnp\.swapaxes"):
        rsj.ring_attention(q, longer, longer, seq_axis=None)
