"""The oracle itself: masks counted by hand, gradients against finite differences."""

import numpy as np
import pytest

from tests.helpers import oracle


def test_window_counts_w_plus_one_keys():
    mask = oracle.visible(np.zeros(6, int), window_size=2)
    assert mask.sum(1).tolist() == [1, 2, 3, 3, 3, 3]
    assert np.flatnonzero(mask[5]).tolist() == [3, 4, 5]


def test_sinks_belong_to_their_own_sequence_and_count_once():
    starts = oracle.starts_from_segment_ids([4, 4, 4, 1, 1, 1, 1, -2, 1, 1])
    assert starts.tolist() == [0, 0, 0, 3, 3, 3, 3, -1, 8, 8]
    mask = oracle.visible(starts, window_size=1, num_sink_tokens=1)
    assert [np.flatnonzero(row).tolist() for row in mask] == [
        [0], [0, 1], [0, 1, 2], [3], [3, 4], [3, 4, 5], [3, 5, 6], [], [8], [8, 9],
    ]  # fmt: skip


def test_cu_seqlens_with_empty_sequences_and_padding():
    starts = oracle.starts_from_cu_seqlens(np.array([0, 0, 2, 2, 5, 5]), 7)
    assert starts.tolist() == [0, 0, 2, 2, 2, -1, -1]


def test_output_of_a_row_by_hand():
    q, k = np.zeros((2, 1, 3, 1, 4))
    v = np.arange(3.0).reshape(1, 3, 1, 1)
    mask = oracle.visible(np.zeros(3, int), None)[None]
    dout = np.ones_like(v)
    out = oracle.attention(q, k, v, dout, mask).out.ravel()
    np.testing.assert_allclose(out, [0, 1 / 2, 3 / 3])
    out = oracle.attention(q, k, v, dout, mask, sink_logits=np.zeros(1)).out.ravel()
    np.testing.assert_allclose(out, [0, 1 / 3, 3 / 4])  # exp(0) more in the denominator


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_equal_finite_differences(softcap, learned):
    rng = np.random.default_rng(1)
    shapes = [(2, 7, 4, 3), (2, 7, 2, 3), (2, 7, 2, 5)]
    inputs = [rng.standard_normal(s) for s in shapes]
    inputs += [rng.standard_normal(4)] if learned else []
    dout = rng.standard_normal((2, 7, 4, 5))
    rows = [[0, 0, 0, 0, 1, 1, 1], [0, 0, -1, 0, 0, 0, -1]]
    starts = [oracle.starts_from_segment_ids(row) for row in rows]
    mask = np.stack([oracle.visible(s, 1, 1) for s in starts])

    def result(q, k, v, sink=None):
        return oracle.attention(q, k, v, dout, mask, logits_soft_cap=softcap, sink_logits=sink)

    def loss(at, index, step):
        moved = [x.copy() for x in inputs]
        moved[at].flat[index] += step
        return (result(*moved).out * dout).sum()

    for at, gradient in enumerate(result(*inputs)[1 : 1 + len(inputs)]):
        numeric = np.array(
            [(loss(at, i, 1e-5) - loss(at, i, -1e-5)) / 2e-5 for i in range(inputs[at].size)]
        )
        assert np.abs(numeric).max() > 1e-2
        np.testing.assert_allclose(gradient.ravel(), numeric, atol=1e-8)


def test_padding_is_zero_and_finite_with_learned_sinks():
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 1, 3, 1, 2))
    mask = oracle.visible(np.full(3, oracle.PADDING), 2)[None]
    for x in oracle.attention(q, k, v, dout, mask, sink_logits=np.ones(1)):
        assert (x == 0).all()
