"""Attention in which each device has whole sequences of some heads: exchange="all_to_all".

Before, a device has one chunk of all heads. It sends each other device that device's heads, and
receives the other chunks of its own heads. It attends, and sends the results back
(DeepSpeed-Ulysses, arXiv:2309.14509). Without a window, where the number of key/value heads on a
device is even, kernels of GPUs have two launches of half of the heads each. The inputs of the
second launch arrive during the first launch; the results of the first one leave during the second.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pallas_kernels import (
    KeyRun,
    Spec,
    attend_keys,
    attend_keys_backward,
    choose,
    delta_of,
    overlaps_messages,
    sink_logits_gradient,
)
from ring_swa_jax._axis import SequenceAxis, same_varying
from ring_swa_jax._head_exchange import HeadExchange
from ring_swa_jax._segments import whole_bounds

MOST_LAUNCHES = 2
"""Most launches of kernels without a window. With a window there is one, because the forward kernel
for Hopper takes every multiprocessor from its beginning: with an exchange at the same time, two
launches took 15 to 22% longer than one on four H100 (65536 tokens, windows of 8191 to 32767)."""


class _Share(NamedTuple):
    """Whole sequences of the heads that one launch attends."""

    key: Float[Array, "B S k H"]
    value: Float[Array, "B S k Hv"]
    query: Float[Array, "B S n H"]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    sink_logits: Float[Array, "N"] | None,
    cu_seqlens: Int[Array, "n"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    axis: SequenceAxis,
    layout: str,
    spec: Spec,
    implementation: str | None,
) -> Float[Array, "B T N Hv"]:
    """Attention of a chunk."""
    batch, chunk, heads, dim = q.shape
    most_launches = MOST_LAUNCHES if spec.window is None else 1
    exchange = HeadExchange.of_heads(axis, layout, k.shape[2], most_launches)
    whole = (batch, axis.size * chunk)
    share = axis.size * exchange.launches
    kv_share = k.shape[2] * exchange.repeats // share
    # `choose` reads shapes and dtypes alone.
    query = jnp.zeros((*whole, heads // share, dim), q.dtype)
    value = jnp.zeros((*whole, kv_share, v.shape[-1]), v.dtype)
    name = choose(implementation, spec, query, value)
    if not overlaps_messages(name):  # it attends any shapes, so also those of one launch
        exchange = exchange.at_once()
    bounds = whole_bounds(axis, chunk, cu_seqlens, segment_ids, ends=spec.lookahead > 0)
    q, k, v, sink_logits, bounds = same_varying(axis, q, k, v, sink_logits, bounds)
    return attend_heads(spec, exchange, name, q, k, v, sink_logits, *bounds)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend_heads(
    spec: Spec,
    exchange: HeadExchange,
    implementation: str,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    sink_logits: Float[Array, "N"] | None,
    start: Int[Array, ""] | Int[Array, "B S"],
    end: Int[Array, "B S"] | None,
) -> Float[Array, "B T N Hv"]:
    """Attention of a chunk's queries to the whole sequence.

    Args:
        spec: static settings.
        exchange: how heads are exchanged for chunks.
        implementation: that of the kernels.
        query: queries of the chunk.
        key: its keys; N is a multiple of lcm(K, P).
        value: its values.
        sink_logits: learned sinks; all inputs vary over the same manual mesh axes.
        start: for each query of the whole sequence, in the order of the tokens, the position of
            the first token of the query's document.
        end: likewise, the position behind the last token of the query's document, where the window
            reaches past the query and there are documents.
    """
    arrays = (query, key, value, sink_logits, start, end)
    return _attend_heads_fwd(spec, exchange, implementation, *arrays)[0]


def _attend_heads_fwd(spec, exchange, implementation, query, key, value, sink_logits, start, end):
    repeated = [jnp.repeat(x, exchange.repeats, axis=2) for x in (key, value)]
    learned = _learned(exchange, sink_logits)
    shares = []

    def compute(launch, arrived, _, start):
        share = _Share(*arrived)
        shares.append(share)
        keys = KeyRun(share.key, share.value, 0)
        state = attend_keys(
            spec, implementation, share.query, keys, learned[launch], start, end, None, query.dtype
        )
        _, state = same_varying(exchange.axis, query, state)
        return [state.out], [state.lse]

    (out,), (lse,) = exchange.run([*repeated, query], [], compute, start)
    out, lse = (checkpoint_name(x, "context") for x in (out, lse))
    return out, (shares, sink_logits, start, end, out, lse)


def _attend_heads_bwd(spec, exchange, implementation, residuals, dout):
    shares, sink_logits, start, end, out, lse = residuals
    # Parts of a head's gradient keep the accumulator's precision until they are added.
    travel = lse.dtype if exchange.repeats > 1 else dout.dtype
    learned = _learned(exchange, sink_logits)
    dlearned: list[Any] = []

    def compute(launch, arrived, sums, start):
        share, (dout,), (lse, delta) = shares[launch], arrived, sums
        keys = KeyRun(share.key, share.value, 0)
        dquery, *dkeys, delta = attend_keys_backward(
            spec, implementation, share.query, keys, start, end,
            lse, delta, dout, None, dout.dtype, travel,
        )  # fmt: skip
        if learned[launch] is not None:
            dlearned.append(sink_logits_gradient(learned[launch], lse, delta))
        return [*dkeys, dquery], []

    sums = [lse, delta_of(out, dout, lse.dtype)]
    (*dkeys, dquery), _ = exchange.run([dout], sums, compute, start)
    dkey, dvalue = (exchange.sum_of_parts(x, dout.dtype) for x in dkeys)
    dsink_logits = None
    if sink_logits is not None:
        dsink_logits = exchange.among_all_heads(jnp.stack(dlearned)).astype(sink_logits.dtype)
    return dquery, dkey, dvalue, dsink_logits, None, None


def _learned(exchange: HeadExchange, sink_logits: Array | None) -> list[Array | None]:
    """The learned sinks of each launch's heads."""
    if sink_logits is None:
        return [None] * exchange.launches
    return list(exchange.own_heads(sink_logits))


attend_heads.defvjp(_attend_heads_fwd, _attend_heads_bwd)
