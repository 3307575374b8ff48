"""Integers of any width, in arrays and in settings: exactly right or an error, never cut off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj
from tests.helpers.routes import make_mesh

pytestmark = pytest.mark.usefixtures("unchecked_signatures")

S = 16
RUNS = np.array([[0] * 5 + [1] * 3 + [-1] * 2 + [2] * 6, [-1] + [0] * 8 + [3] * 7])
Q, K, V = jax.random.normal(jax.random.key(0), (3, 2, S, 2, 8))
RIGHT = rsj.reference_attention(Q, K, V, window_size=4, segment_ids=RUNS.astype(np.int32))
CU = np.array([0, 5, 5, 11, 14])
PACKED = rsj.ring_sliding_window_attn_varlen(Q[0], K[0], V[0], window_size=4, cu_seqlens=CU)


def ids_of(dtype):
    """`RUNS` with ids at the dtype's ends, 64-bit ones differing above bit 31 alone."""
    info = jnp.iinfo(dtype)
    ids = RUNS.astype(np.int64) % 4
    real = (ids << 32) | 7 if info.bits == 64 else np.int64(info.max) - ids
    padding = -1 if info.min < 0 else None
    return np.where(RUNS < 0, padding, real).astype(dtype) if padding else real.astype(dtype)


def attend(ids, **options):
    return rsj.ring_attention(Q, K, V, window_size=4, segment_ids=ids, **options)


USES = {
    "one device": lambda ids: attend(ids, seq_axis=None),
    "four devices": lambda ids: attend(ids, mesh=make_mesh(seq=4)),
    "reference": lambda ids: rsj.reference_attention(Q, K, V, window_size=4, segment_ids=ids),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
@pytest.mark.parametrize("as_list", [False, True], ids=["numpy", "list"])
def test_segment_ids_of_numpy(dtype, use, as_list):
    ids = ids_of(dtype)
    np.testing.assert_allclose(USES[use](ids.tolist() if as_list else ids), RIGHT, atol=1e-5)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_unsigned_ids_are_no_padding(dtype, use):
    changes = np.cumsum(np.pad(RUNS[:, 1:] != RUNS[:, :-1], ((0, 0), (1, 0))), axis=1)
    right = rsj.reference_attention(Q, K, V, window_size=4, segment_ids=changes)
    ids = (jnp.iinfo(dtype).max - changes.astype(object)).astype(dtype)
    np.testing.assert_allclose(USES[use](ids), right, atol=1e-5)
    if jnp.iinfo(dtype).bits < 64:
        np.testing.assert_allclose(USES[use](jnp.asarray(ids)), right, atol=1e-5)


@pytest.mark.parametrize("use", USES)
def test_64_bit_ids_that_jax_holds(use):
    with jax.enable_x64(True):
        ids = jnp.asarray(ids_of("int64"))
        assert ids.dtype == jnp.int64
        np.testing.assert_allclose(jax.jit(USES[use])(ids), RIGHT, atol=1e-5)


def test_positions_and_caches_by_64_bit_ids():
    ids = ids_of("int64")
    np.testing.assert_array_equal(rsj.segment_positions(ids), rsj.segment_positions(RUNS))
    cache = rsj.prefill_cache(K, V, window_size=4, segment_ids=ids)
    assert cache.length.tolist() == [6, 7]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
def test_cu_seqlens(dtype):
    ends = np.array(CU, dtype)
    if jnp.iinfo(dtype).bits == 64:
        ends = np.append(ends, np.array([1 << 40], dtype))  # past the row: the rest is a sequence
    expected = PACKED if jnp.iinfo(dtype).bits < 64 else packed([*CU, S])
    np.testing.assert_array_equal(packed(ends), expected)
    with jax.enable_x64(True):
        np.testing.assert_allclose(packed(jnp.asarray(ends)), expected, atol=1e-6)


def packed(ends):
    return rsj.ring_sliding_window_attn_varlen(Q[0], K[0], V[0], window_size=4, cu_seqlens=ends)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64"])
def test_positions(dtype):
    positions = np.minimum(np.arange(S)[None] * 7, jnp.iinfo(dtype).max).astype(dtype)
    right = rsj.apply_rope(Q, jnp.asarray(positions, jnp.int32))
    np.testing.assert_array_equal(rsj.apply_rope(Q, positions), right)
    np.testing.assert_array_equal(rsj.apply_rope(Q, positions.tolist()), right)


def test_positions_that_do_not_fit_raise_or_are_right():
    positions = (np.arange(S) + (1 << 33))[None]
    with pytest.raises(ValueError, match=r"8589934592 to 8589934607 .* jax_enable_x64"):
        rsj.apply_rope(Q, positions)
    with jax.enable_x64(True):
        far = rsj.apply_rope(Q, positions)
        q, k = (np.asarray(x, np.float64) for x in (far[:, 3], far[:, 9]))
        near = rsj.apply_rope(Q, np.arange(S)[None])
    np.testing.assert_allclose((q * k).sum(-1), (near[:, 3] * near[:, 9]).sum(-1), atol=1e-5)


HUGE = 2**40 + 3


@pytest.mark.parametrize("settings", [(HUGE, 0), (HUGE, HUGE), (4, HUGE), (None, HUGE)], ids=str)
def test_settings_of_any_size(settings):
    window, sinks = settings
    options = dict(window_size=window, num_sink_tokens=sinks)
    right = rsj.reference_attention(Q, K, V)
    np.testing.assert_allclose(rsj.reference_attention(Q, K, V, **options), right, atol=1e-6)
    here = rsj.ring_attention(Q, K, V, seq_axis=None, **options)
    np.testing.assert_allclose(here, right, atol=1e-5)
    if window != 4:  # sinks that no chunk holds raise
        ring = rsj.ring_attention(Q, K, V, mesh=make_mesh(seq=4), **options)
        np.testing.assert_allclose(ring, right, atol=1e-5)


@pytest.mark.parametrize("settings", [(HUGE, 0), (HUGE, HUGE), (4, HUGE), (None, HUGE)], ids=str)
@pytest.mark.parametrize("rotate", [None, rsj.apply_rope], ids=["absolute", "relative"])
def test_decoding_with_settings_of_any_size(settings, rotate):
    window, sinks = settings
    options = dict(window_size=window, num_sink_tokens=sinks)
    cache = rsj.init_cache(2, 2, 8, max_length=S, relative_positions=rotate is not None, **options)

    @jax.jit
    def decode(cache):
        out = []
        for begin, end in ((0, 9), (9, 10), (10, S)):
            new = (x[:, begin:end] for x in (Q, K, V))
            y, cache = rsj.decode_attention(*new, cache, rotate=rotate, **options)
            out.append(y)
        return jnp.concatenate(out, axis=1)

    turned = (x if rotate is None else rotate(x, jnp.arange(S)) for x in (Q, K))
    right = rsj.reference_attention(*turned, V)
    np.testing.assert_allclose(decode(cache), right, atol=1e-5)
