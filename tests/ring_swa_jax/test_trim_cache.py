"""Tokens that are taken back from a cache, as speculative decoding does with rejected drafts."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj
from tests.helpers.layers import quick

pytestmark = pytest.mark.usefixtures("unchecked_signatures")

B, S, N, H = 2, 60, 2, 8
Q, K, V = jax.random.normal(jax.random.key(0), (3, B, S, N, H))
ROWS = jnp.arange(B)[:, None]


def tokens(at, count):
    """Queries, keys and values of the next tokens of each row."""
    index = jnp.asarray(at)[:, None] + jnp.arange(count)[None]
    return tuple(x[ROWS, index] for x in (Q, K, V))


def speculate(window, sinks, max_trim, relative, prompt, rounds, max_length=None):
    """Each round decodes its drafts and takes back those of each row that are not accepted.

    Returns the results of one more token a row, which are to be those of an untouched cache.
    """
    options = dict(window_size=window, num_sink_tokens=sinks)
    rotate = rsj.apply_rope if relative else None
    decode = quick(functools.partial(rsj.decode_attention, rotate=rotate, **options))
    caches = dict(max_trim=max_trim, max_length=max_length, relative_positions=relative)
    cache = rsj.prefill_cache(K[:, :prompt], V[:, :prompt], **options, **caches)
    clean = rsj.prefill_cache(K[:, :prompt], V[:, :prompt], **options, **caches)
    at = np.full(B, prompt)
    for drafts, accepted in rounds:
        accepted = np.array(accepted)
        q, k, v = tokens(at, drafts)
        wrong = (np.arange(drafts)[None] >= accepted[:, None])[..., None, None]
        _, cache = decode(q, jnp.where(wrong, 3 * k + 1, k), jnp.where(wrong, -v, v), cache)
        cache = rsj.trim_cache(cache, drafts - accepted)
        _, clean = decode(q, k, v, clean, valid=jnp.asarray(~wrong[..., 0, 0]))
        at += accepted
        got, right = (decode(*tokens(at, 2), x)[0] for x in (cache, clean))
        np.testing.assert_allclose(got, right, atol=1e-5)
    assert cache.length.tolist() == at.tolist()
    return got, at


ROUNDS = [(4, (1, 4)), (4, (0, 2)), (1, (0, 1)), (5, (1, 5)), (5, (5, 3)), (3, (0, 0)), (2, (2, 1))]


@pytest.mark.parametrize(
    ("window", "sinks", "relative"),
    [
        pytest.param(3, 2, False, marks=pytest.mark.slow),
        (3, 2, True),
        *(
            pytest.param(*case, relative, marks=pytest.mark.slow)
            for case in ((7, 0), (0, 1))
            for relative in (False, True)
        ),
    ],
)
def test_rejected_drafts_leave_no_trace(window, sinks, relative):
    got, at = speculate(window, sinks, 5, relative, prompt=9, rounds=ROUNDS)
    if not relative:
        whole = rsj.reference_attention(Q, K, V, window_size=window, num_sink_tokens=sinks)
        np.testing.assert_allclose(got, whole[ROWS, at[:, None] + np.arange(2)], atol=1e-5)


@pytest.mark.parametrize("window", [None, pytest.param(30, marks=pytest.mark.slow)])
def test_a_cache_of_all_tokens_gives_back_any_number(window):
    speculate(window, 0, 1, False, prompt=2, rounds=ROUNDS[:4], max_length=30)
    cache = rsj.prefill_cache(K[:, :8], V[:, :8], window_size=window, max_length=30)
    assert rsj.trim_cache(cache, 8).length.tolist() == [0, 0]


def after(max_trim=3, **options):
    return rsj.prefill_cache(K[:, :20], V[:, :20], window_size=4, max_trim=max_trim, **options)


def is_lost(cache, rows):
    out, cache = rsj.decode_attention(*tokens([20, 20], 1), cache, window_size=4)
    again, _ = rsj.decode_attention(*tokens([21, 21], 1), cache, window_size=4)
    for x in (out, again):
        assert np.isnan(x).all((1, 2, 3)).tolist() == rows
        assert np.isnan(x).any((1, 2, 3)).tolist() == rows


def test_rows_that_give_back_too_much_are_lost():
    is_lost(rsj.trim_cache(after(), jnp.array([3, 4])), [False, True])
    is_lost(rsj.trim_cache(rsj.trim_cache(after(), jnp.array([1, 2])), 2), [False, True])
    is_lost(rsj.trim_cache(rsj.trim_cache(after(), jnp.array([0, 4])), 1), [False, True])
    is_lost(rsj.trim_cache(after(), np.array([-1, 2**40])), [True, True])
    short = rsj.prefill_cache(K[:, :2], V[:, :2], window_size=4, max_trim=3)
    is_lost(rsj.trim_cache(short, jnp.array([2, 3])), [False, True])


def test_new_tokens_make_room_for_more():
    cache = rsj.trim_cache(after(), 3)
    for begin in (17, 18):
        _, cache = rsj.decode_attention(*tokens([begin] * 2, 1), cache, window_size=4)
    assert cache.trimmed.tolist() == [1, 1]
    assert rsj.trim_cache(cache, 2).length.tolist() == [17, 17]
    is_lost(rsj.trim_cache(cache, jnp.array([2, 3])), [False, True])


@pytest.mark.slow
def test_a_streams_count_may_fall_back():
    """Past 2**30 the count of relative positions falls back; tokens can be taken back there too."""
    options = dict(window_size=4, num_sink_tokens=2)
    rotate = rsj.apply_rope

    def run(length):
        cache = rsj.prefill_cache(
            K[:, :20], V[:, :20], max_trim=3, relative_positions=True, **options
        )
        cache = copy.copy(cache)
        object.__setattr__(cache, "length", jnp.full(B, length, jnp.int32))
        _, cache = rsj.decode_attention(*tokens([20, 20], 4), cache, rotate=rotate, **options)
        cache = rsj.trim_cache(cache, 3)
        return rsj.decode_attention(*tokens([21, 21], 3), cache, rotate=rotate, **options)

    (near, _), (far, cache) = run(20 + 7 * 2), run(20 + 7 * ((2**30 - 22) // 7))
    np.testing.assert_allclose(far, near, atol=1e-5)
    assert cache.length.max() < 100


@pytest.mark.parametrize(
    ("count", "error", "shown"),
    [
        (4, ValueError, "max_trim=4"),
        (-1, ValueError, "negative"),
        (1.5, TypeError, "float"),
        (jnp.zeros(3, int), ValueError, "(3,)"),
    ],
    ids=str,
)
def test_counts_that_do_not_fit(count, error, shown):
    with pytest.raises(error) as caught:
        rsj.trim_cache(after(), count)
    assert shown in str(caught.value)
