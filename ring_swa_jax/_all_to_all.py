"""Attention in which each device has whole sequences of some heads: exchange="all_to_all".

Before, a device has one chunk of all heads. It sends each other device that device's heads, and
receives the other chunks of its own heads. It attends, and sends the results back
(DeepSpeed-Ulysses, arXiv:2309.14509). Without a window, where the number of key/value heads on a
device is even, there are two launches of half of the heads each. The inputs of the second launch
arrive during the first launch; the results of the first launch leave during the second one.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pallas_kernels import (
    KeyRun,
    Spec,
    attend_keys,
    attend_keys_backward,
    choose,
    delta_of,
    sink_logits_gradient,
)
from ring_swa_jax._axis import SequenceAxis, after, same_varying
from ring_swa_jax._layout import from_dual_order, to_dual_order
from ring_swa_jax._segments import whole_bounds

MOST_LAUNCHES = 2
"""Most launches without a window. With a window there is one, because the forward kernel for Hopper
takes every multiprocessor from its beginning: with an exchange at the same time, two launches took
15 to 22% longer than one on four H100 (65536 tokens, windows of 8191 to 32767)."""


class _Share(NamedTuple):
    """Whole sequences of the heads that one launch attends."""

    key: Float[Array, "B S k H"]
    value: Float[Array, "B S k Hv"]
    query: Float[Array, "B S n H"]


@dataclasses.dataclass(frozen=True)
class HeadExchange:
    """Exchanges chunks of all heads for whole sequences of some heads, and back.

    Attributes:
        axis: mesh axis that cuts the sequence; its size P divides the N query heads.
        layout: order of the tokens in the caller's arrays.
        kv_heads: K, of which N is a multiple.
        launches: number of launches into which each device divides its heads.
    """

    axis: SequenceAxis
    layout: str
    kv_heads: int
    launches: int

    @classmethod
    def of_heads(
        cls, axis: SequenceAxis, layout: str, kv_heads: int, most_launches: int
    ) -> "HeadExchange":
        """Launches: the largest divisor of ``most_launches`` that divides a device's kv heads."""
        launches = math.gcd(math.lcm(kv_heads, axis.size) // axis.size, most_launches)
        return cls(axis, layout, kv_heads, launches)

    @property
    def repeats(self) -> int:
        """How often each key/value head is repeated, so that there are lcm(K, P) of them."""
        return math.lcm(self.kv_heads, self.axis.size) // self.kv_heads

    def pipeline(
        self,
        inputs: list[Array],
        compute: Callable[[int, list[Array], Array], list[Array]],
        start: Array,
    ) -> list[Array]:
        """Runs all launches; the exchange of one overlaps with the computation of another.

        If several messages are sent at once, XLA overlaps only the last one with a kernel.

        Args:
            inputs: arrays [B, T, N, H] of this device's chunk, the largest one last.
            compute: function of a launch's number, of the inputs of its heads [B, S, n, H] and of
                ``start``. Returns arrays [B, S, n, H], the largest one last.
            start: an array that only ``compute`` reads. `pipeline` makes this array depend on the
                messages that are to travel during the launch.

        Returns:
            The results for this device's chunk, all heads of each, [B, T, N, H].
        """
        returned: list[list[Array]] = []
        leaving: list[Array] = []
        arrived, _ = self._fetch(inputs, 0, None)
        for launch in range(self.launches):
            here, begin = arrived, after(start, *leaving[-1:])
            if launch + 1 < self.launches:
                arrived, message = self._fetch(inputs, launch + 1, here[-1])
                begin = after(begin, message)
            leaving = [self._leaving(x) for x in compute(launch, here, begin)]
            returned.append([self._returned(x) for x in leaving])
        return [self._joined(parts) for parts in zip(*returned, strict=True)]

    def sums_to_chunks(self, sums: list[Float[Array, "B n S"]]) -> Float[Array, "B N T"]:
        """One number for each query and head, from those of all launches."""
        x = jnp.stack(sums, axis=1)
        x = to_dual_order(x, self.axis.size, 3) if self.layout == "dual_chunk" else x
        chunks = jnp.moveaxis(x.reshape(*x.shape[:3], self.axis.size, -1), 3, 0)
        x = jnp.moveaxis(self._exchange(chunks), 0, 1)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def sums_to_heads(self, *sums: Float[Array, "B N T"]) -> list[Float[Array, "sums B n S"]]:
        """The inverse of `sums_to_chunks`, of several such numbers in one message."""
        x = jnp.stack(sums)
        x = x.reshape(*x.shape[:2], self.axis.size, self.launches, -1, x.shape[-1])
        x = jnp.moveaxis(self._exchange(jnp.moveaxis(x, 2, 0)), 0, 4)
        x = x.reshape(*x.shape[:4], -1)
        x = from_dual_order(x, self.axis.size, 4) if self.layout == "dual_chunk" else x
        return [x[:, :, launch] for launch in range(self.launches)]

    def sum_of_parts(self, x: Float[Array, "B T R H"], dtype) -> Float[Array, "B T K H"]:
        """The gradient of the keys from that of the repeated keys.

        One sum adds the parts that several devices computed of a head, in the devices' order.
        """
        return x.reshape(*x.shape[:2], self.kv_heads, -1, x.shape[-1]).sum(3).astype(dtype)

    def own_heads(self, x: Float[Array, "N"]) -> Float[Array, "launches n"]:
        """This device's share of one number for each head."""
        return x.reshape(self.axis.size, self.launches, -1)[self.axis.index()]

    def among_all_heads(self, x: Float[Array, "launches n"]) -> Float[Array, "N"]:
        """Zeros for the heads of other devices: the transpose of `own_heads`."""
        devices = jnp.arange(self.axis.size, dtype=jnp.int32)[:, None, None]
        return jnp.where(devices == self.axis.index(), x[None], 0).reshape(-1)

    def _fetch(
        self, inputs: list[Array], launch: int, before: Array | None
    ) -> tuple[list[Array], Array]:
        """The inputs of a launch's heads, received one after the other, and the last message."""
        arrived: list[Array] = []
        for x in inputs:
            message = after(self._outgoing(x, launch), before)
            before = self._arrived(message)
            arrived.append(before)
        return arrived, message

    def _outgoing(self, x: Float[Array, "B T N H"], launch: int) -> Float[Array, "P B T n H"]:
        batch, chunk, _, dim = x.shape
        x = x.reshape(batch, chunk, self.axis.size, self.launches, -1, dim)
        return jnp.moveaxis(x[:, :, :, launch], 2, 0)

    def _arrived(self, outgoing: Float[Array, "P B T n H"]) -> Float[Array, "B S n H"]:
        x = jnp.moveaxis(self._exchange(outgoing), 0, 1)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return from_dual_order(x, self.axis.size) if self.layout == "dual_chunk" else x

    def _leaving(self, x: Float[Array, "B S n H"]) -> Float[Array, "P B T n H"]:
        x = to_dual_order(x, self.axis.size) if self.layout == "dual_chunk" else x
        return jnp.moveaxis(x.reshape(x.shape[0], self.axis.size, -1, *x.shape[2:]), 1, 0)

    def _returned(self, leaving: Float[Array, "P B T n H"]) -> Float[Array, "B T P n H"]:
        return jnp.moveaxis(self._exchange(leaving), 0, 2)

    def _exchange(self, x: Array) -> Array:
        """Sends row d to device d; row d of the result comes from device d."""
        return lax.all_to_all(x, self.axis.name, split_axis=0, concat_axis=0, tiled=True)

    def _joined(self, parts: Sequence[Float[Array, "B T P n H"]]) -> Float[Array, "B T N H"]:
        x = jnp.stack(parts, axis=3)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])


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
    shares, sums = [], []

    def compute(launch, arrived, start):
        share = _Share(*arrived)
        shares.append(share)
        keys = KeyRun(share.key, share.value, 0)
        state = attend_keys(
            spec, implementation, share.query, keys, learned[launch], start, end, None, query.dtype
        )
        _, state = same_varying(exchange.axis, query, state)
        sums.append(state.lse)
        return [state.out]

    (out,) = exchange.pipeline([*repeated, query], compute, start)
    out = checkpoint_name(out, "context")
    lse = checkpoint_name(exchange.sums_to_chunks(sums), "context")
    return out, (shares, sink_logits, start, end, out, lse)


def _attend_heads_bwd(spec, exchange, implementation, residuals, dout):
    shares, sink_logits, start, end, out, lse = residuals
    # Parts of a head's gradient keep the accumulator's precision until they are added.
    travel = lse.dtype if exchange.repeats > 1 else dout.dtype
    learned = _learned(exchange, sink_logits)
    sums = exchange.sums_to_heads(lse, delta_of(out, dout, lse.dtype))
    dlearned: list[Any] = []

    def compute(launch, arrived, start):
        share, (dout,) = shares[launch], arrived
        keys = KeyRun(share.key, share.value, 0)
        lse, delta = sums[launch]
        dquery, *dkeys, delta = attend_keys_backward(
            spec, implementation, share.query, keys, start, end,
            lse, delta, dout, None, dout.dtype, travel,
        )  # fmt: skip
        if learned[launch] is not None:
            dlearned.append(sink_logits_gradient(learned[launch], lse, delta))
        return [*dkeys, dquery]

    *dkeys, dquery = exchange.pipeline([dout], compute, start)
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
