"""Chunks of all heads for whole sequences of some heads, and back: the messages of "all_to_all".

`HeadExchange` is for kernels, which run while messages travel; `ExchangeAtOnce` is for plain JAX.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ring_swa_jax._axis import SequenceAxis, after
from ring_swa_jax._layout import from_dual_order, to_dual_order

Compute = Callable[[int, list[Array], list[Array], Array], tuple[list[Array], list[Array]]]
"""What a launch computes: a function of its number; of the inputs of its heads, [B, S, n, H]; of
numbers for each query and head, [B, n, S]; and of an array ``start``. It returns such arrays and
such numbers."""


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

    def at_once(self) -> "ExchangeAtOnce":
        """The exchange of the same heads for an implementation beside which nothing travels."""
        return ExchangeAtOnce(self.axis, self.layout, self.kv_heads, launches=1)

    @property
    def repeats(self) -> int:
        """How often each key/value head is repeated, so that there are lcm(K, P) of them."""
        return math.lcm(self.kv_heads, self.axis.size) // self.kv_heads

    def run(
        self, inputs: list[Array], sums: list[Array], compute: Compute, start: Array
    ) -> tuple[list[Array], list[Array]]:
        """Runs all launches; the exchange of one overlaps with the computation of another.

        If several messages are sent at once, XLA overlaps only the last one with a kernel.

        Args:
            inputs: arrays [B, T, N, H] of this device's chunk, the largest one last.
            sums: arrays [B, N, T] of it, one number for each query and head.
            compute: what a launch computes, with the largest result last.
            start: an array that only ``compute`` reads. `run` makes this array depend on the
                messages that are to travel during the launch.

        Returns:
            The results for this device's chunk, all heads of each, [B, T, N, H] and [B, N, T].
        """
        returned: list[list[Array]] = []
        leaving: list[Array] = []
        sums_there = self._sums_to_heads(sums)
        sums_found = []
        arrived, _ = self._fetch(inputs, 0, None)
        for launch in range(self.launches):
            here, begin = arrived, after(start, *leaving[-1:])
            if launch + 1 < self.launches:
                arrived, message = self._fetch(inputs, launch + 1, here[-1])
                begin = after(begin, message)
            results, new_sums = compute(launch, here, list(sums_there[launch]), begin)
            leaving = [self._leaving(x) for x in results]
            returned.append([self._returned(x) for x in leaving])
            sums_found.append(new_sums)
        joined = [self._joined(parts) for parts in zip(*returned, strict=True)]
        return joined, [self._sums_to_chunks(x) for x in zip(*sums_found, strict=True)]

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

    def _arrived(self, outgoing: Float[Array, "P B T *heads"]) -> Float[Array, "B S *heads"]:
        x = jnp.moveaxis(self._exchange(outgoing), 0, 1)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return from_dual_order(x, self.axis.size) if self.layout == "dual_chunk" else x

    def _leaving(self, x: Float[Array, "B S n H"]) -> Float[Array, "P B T n H"]:
        x = to_dual_order(x, self.axis.size) if self.layout == "dual_chunk" else x
        return jnp.moveaxis(x.reshape(x.shape[0], self.axis.size, -1, *x.shape[2:]), 1, 0)

    def _returned(self, leaving: Float[Array, "P B T *heads"]) -> Float[Array, "B T P *heads"]:
        return jnp.moveaxis(self._exchange(leaving), 0, 2)

    def _sums_to_chunks(self, sums: Sequence[Float[Array, "B n S"]]) -> Float[Array, "B N T"]:
        """One number for each query and head, from those of all launches."""
        x = jnp.stack(sums, axis=1)
        x = to_dual_order(x, self.axis.size, 3) if self.layout == "dual_chunk" else x
        chunks = jnp.moveaxis(x.reshape(*x.shape[:3], self.axis.size, -1), 3, 0)
        x = jnp.moveaxis(self._exchange(chunks), 0, 1)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _sums_to_heads(
        self, sums: list[Float[Array, "B N T"]]
    ) -> Sequence[Float[Array, "sums B n S"] | tuple[()]]:
        """For each launch its heads' numbers; all travel in one message."""
        if not sums:
            return [()] * self.launches
        x = jnp.stack(sums)
        x = x.reshape(*x.shape[:2], self.axis.size, self.launches, -1, x.shape[-1])
        x = jnp.moveaxis(self._exchange(jnp.moveaxis(x, 2, 0)), 0, 4)
        x = x.reshape(*x.shape[:4], -1)
        x = from_dual_order(x, self.axis.size, 4) if self.layout == "dual_chunk" else x
        return [x[:, :, launch] for launch in range(self.launches)]

    def _exchange(self, x: Array) -> Array:
        """Sends row d to device d; row d of the result comes from device d."""
        return lax.all_to_all(x, self.axis.name, split_axis=0, concat_axis=0, tiled=True)

    def _joined(self, parts: Sequence[Float[Array, "B T P n H"]]) -> Float[Array, "B T N H"]:
        x = jnp.stack(parts, axis=3)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])


class ExchangeAtOnce(HeadExchange):
    """The same exchange around one launch, with one message for all arrays of a dtype.

    On a CPU XLA compiles a message as a copy for each device and one that joins what arrives. So
    programs with fewer messages compile faster, and beside plain JAX none would overlap.
    """

    def run(
        self, inputs: list[Array], sums: list[Array], compute: Compute, start: Array
    ) -> tuple[list[Array], list[Array]]:
        """As `HeadExchange.run`."""
        outgoing = [self._outgoing(x, 0) for x in [*inputs, *map(_as_heads, sums)]]
        arrived = _in_messages(outgoing, self._arrived)
        numbers = [_as_sums(x) for x in arrived[len(inputs) :]]
        results, sums = compute(0, arrived[: len(inputs)], numbers, start)
        leaving = [self._leaving(x) for x in [*results, *map(_as_heads, sums)]]
        back = _in_messages(leaving, self._returned)
        return back[: len(results)], [_as_sums(x) for x in back[len(results) :]]


def _in_messages(
    parts: list[Float[Array, "P B T _ _"]], send: Callable[[Array], Array]
) -> list[Float[Array, "B _ _ _"]]:
    """What is received of several arrays, those of a dtype in one message."""
    received = {}
    for dtype in dict.fromkeys(x.dtype for x in parts):
        some = {number: x for number, x in enumerate(parts) if x.dtype == dtype}
        flat = [x.reshape(*x.shape[:3], -1) for x in some.values()]
        ends = list(itertools.accumulate(x.shape[-1] for x in flat))
        pieces = jnp.split(send(jnp.concatenate(flat, axis=-1)), ends[:-1], axis=-1)
        for (number, x), piece in zip(some.items(), pieces, strict=True):
            received[number] = piece.reshape(*piece.shape[:2], -1, x.shape[-1])
    return [received[number] for number in range(len(parts))]


def _as_heads(x: Float[Array, "B n T"]) -> Float[Array, "B T n 1"]:
    return jnp.moveaxis(x, 1, 2)[..., None]


def _as_sums(x: Float[Array, "B T n 1"]) -> Float[Array, "B n T"]:
    return jnp.moveaxis(x[..., 0], 2, 1)
