"""Sliding-window attention with sinks in float64 NumPy, forward and analytic backward.

Written from section 1 of the design alone, with an explicit [S, S] mask per batch row. It shares
no code with the library and does not import it.
"""

import itertools
from typing import NamedTuple

import numpy as np

PADDING = -1


class Result(NamedTuple):
    """Output and the gradients of sum(out * dout)."""

    out: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dsink: np.ndarray | None


def starts_from_segment_ids(ids):
    """First position of each token's sequence, [S]; a new one wherever the id changes."""
    starts = []
    for i, segment in enumerate(ids):
        if segment < 0:
            starts.append(PADDING)
        elif i > 0 and ids[i - 1] == segment:
            starts.append(starts[i - 1])
        else:
            starts.append(i)
    return np.array(starts, np.int64)


def starts_from_cu_seqlens(cu_seqlens, length):
    """First position of each token's sequence, [S]; tokens past the last entry are padding."""
    starts = np.full(length, PADDING, np.int64)
    for first, last in itertools.pairwise(cu_seqlens):
        starts[first:last] = first
    return starts


def visible(starts, window_size, num_sink_tokens=0):
    """mask[i, j]: query i attends key j, [S, S]. A pair is (keys before, keys after)."""
    i = np.arange(len(starts))[:, None]
    j = np.arange(len(starts))[None, :]
    start = starts[:, None]
    same_sequence = (start == starts[None, :]) & (start != PADDING)
    left, right = window_size if isinstance(window_size, tuple) else (window_size, 0)
    in_window = np.full((1, 1), True)
    if left is not None:
        in_window = in_window & (i - j <= left)
    if right is not None:
        in_window = in_window & (j - i <= right)
    is_sink = (j <= i) & (j - start < num_sink_tokens)
    return same_sequence & (in_window | is_sink)


def attention(q, k, v, dout, mask, *, scale=None, logits_soft_cap=None, sink_logits=None):
    """q [B,S,N,H], k [B,S,K,H], v [B,S,K,Hv], dout [B,S,N,Hv], mask [B,S,S] -> Result."""
    # Heads go before positions, for products of matrices; query head n reads n // group.
    q, k, v, dout = (np.swapaxes(np.asarray(x, np.float64), 1, 2) for x in (q, k, v, dout))
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    scale = dim**-0.5 if scale is None else scale
    key, value = (np.repeat(x, group, axis=1) for x in (k, v))
    mask = mask[:, None]  # [B, 1, S, S]
    has_key = mask.any(-1, keepdims=True)

    logits = q @ key.mT * scale
    slope = np.ones_like(logits)
    if logits_soft_cap is not None:
        tanh = np.tanh(logits / logits_soft_cap)
        logits, slope = logits_soft_cap * tanh, 1 - tanh**2
    top = np.where(mask, logits, -np.inf).max(-1, keepdims=True)
    if sink_logits is not None:
        sink = np.asarray(sink_logits, np.float64)[None, :, None, None]
        top = np.maximum(top, sink)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.where(mask, np.exp(np.where(mask, logits, top) - top), 0.0)
    denominator = weights.sum(-1, keepdims=True)
    if sink_logits is not None:
        sink_weight = np.exp(sink - top)
        denominator = denominator + sink_weight
    denominator = np.where(has_key, denominator, 1.0)
    p = weights / denominator

    out = p @ value
    dp = dout @ value.mT
    delta = (p * dp).sum(-1, keepdims=True)
    dlogits = p * (dp - delta) * slope * scale
    dq = dlogits @ key
    dk, dv = (
        x.reshape(batch, kv_heads, group, length, -1).sum(2) for x in (dlogits.mT @ q, p.mT @ dout)
    )
    dsink = None
    if sink_logits is not None:
        p_sink = np.where(has_key, sink_weight / denominator, 0.0)
        dsink = -(p_sink * delta).sum((0, 2, 3))
    return Result(*(np.swapaxes(x, 1, 2) for x in (out, dq, dk, dv)), dsink)
