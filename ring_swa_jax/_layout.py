"""The order in which devices hold the tokens, and conversions between the orders.

"contiguous": device r of P holds chunk r. "dual_chunk": device r holds the half chunks r and
2P - 1 - r, so that under a causal mask all devices attend equally many keys.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from ring_swa_jax._axis import SequenceAxis

LAYOUTS = ("contiguous", "dual_chunk")


def check_layout(layout: str) -> None:
    """Checks that ``layout`` is a known name.

    Raises:
        ValueError: an unknown name.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is none of {LAYOUTS}")


def check_halves(layout: str, length: int, devices: int) -> None:
    """Checks that a dual-chunk sequence divides into two equal half chunks for each device.

    Raises:
        ValueError: the layout is "dual_chunk" and the length is not divisible.
    """
    if layout == "dual_chunk" and devices > 1 and length % (2 * devices):
        raise ValueError(
            f"layout='dual_chunk' cuts the sequence into two half chunks a device, but its length "
            f"{length} is not a multiple of 2 x {devices}; pad the sequence and give the padding "
            "a negative segment id"
        )


def to_dual_order(x: Array, devices: int, axis: int = 1) -> Array:
    """Reorders a whole array from the order of its tokens to dual-chunk order along an axis."""
    shape = x.shape
    halves = x.reshape(*shape[:axis], 2 * devices, -1, *shape[axis + 1 :])
    first, second = jnp.split(halves, 2, axis)
    return jnp.stack([first, jnp.flip(second, axis)], axis + 1).reshape(shape)


def from_dual_order(x: Array, devices: int, axis: int = 1) -> Array:
    """The inverse of `to_dual_order`."""
    shape = x.shape
    pairs = x.reshape(*shape[:axis], devices, 2, -1, *shape[axis + 1 :])
    first, second = (lax.index_in_dim(pairs, n, axis + 1, keepdims=False) for n in (0, 1))
    return jnp.concatenate([first, jnp.flip(second, axis)], axis).reshape(shape)


@dataclasses.dataclass(frozen=True)
class HalfChunks:
    """The 2P half chunks of a sequence of P chunks.

    Chunk c consists of the half chunks 2c and 2c + 1. Where a chunk's length is odd, half chunk 2c
    is one token longer.
    """

    axis: SequenceAxis
    chunk: int

    @property
    def longest(self) -> int:
        """Length of the half chunks with even numbers."""
        return (self.chunk + 1) // 2

    def of_device(self, device: Array) -> tuple[Array, Array]:
        """Numbers of the half chunks that a device holds in dual-chunk order."""
        return device, 2 * self.axis.size - 1 - device

    def begin(self, half: Array) -> Int[Array, ""]:
        """Position of a half chunk's first token."""
        return half // 2 * self.chunk + half % 2 * self.longest

    def length(self, half: Array) -> Int[Array, ""]:
        """Length of a half chunk."""
        return self.longest - half % 2 * (2 * self.longest - self.chunk)

    def to_dual_chunks(self, x: Array, axis: int = 1) -> Array:
        """From this device's part of a contiguous array to its part in dual-chunk order.

        One permute sends the half chunks with even numbers, a second one those with odd numbers.
        """
        even, odd = jnp.split(x, [self.longest], axis)
        even = self._permute(even, 0, lambda source, target: (source, target))
        odd = self._permute(odd, 1, lambda source, target: (source, target))
        in_order, swapped = (jnp.concatenate(parts, axis) for parts in ((even, odd), (odd, even)))
        return jnp.where(self.axis.index() % 2 == 0, in_order, swapped)

    def from_dual_chunks(self, x: Array, axis: int = 1) -> Array:
        """The inverse of `to_dual_chunks`."""
        first_is_even = self.axis.index() % 2 == 0
        even, odd = jnp.split(x, [self.longest], axis)
        swapped_odd, swapped_even = jnp.split(x, [self.chunk - self.longest], axis)
        even = jnp.where(first_is_even, even, swapped_even)
        odd = jnp.where(first_is_even, odd, swapped_odd)
        even = self._permute(even, 0, lambda source, target: (target, source))
        odd = self._permute(odd, 1, lambda source, target: (target, source))
        return jnp.concatenate([even, odd], axis)

    def _permute(self, x: Array, parity: int, pair: Callable[[int, int], tuple[int, int]]) -> Array:
        """Sends each half chunk 2c + parity from its device in one layout to that in the other.

        ``pair`` orders (device in the contiguous layout, device in the dual-chunk layout) as
        (source, target).
        """
        last = 2 * self.axis.size - 1
        pairs = []
        for source in range(self.axis.size):
            half = 2 * source + parity
            pairs.append(pair(source, min(half, last - half)))
        return lax.ppermute(x, self.axis.name, pairs)


def in_order_of_tokens(
    attend: Callable[[Array, Array, Array], Array],
    axis: SequenceAxis,
    layout: str,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
) -> Float[Array, "B T N Hv"]:
    """``attend(q, k, v)``, called with contiguous arrays where those given are in this layout."""
    if layout != "dual_chunk" or axis.size == 1:
        return attend(q, k, v)
    halves = HalfChunks(axis, q.shape[1])
    q, k, v = (halves.from_dual_chunks(x) for x in (q, k, v))
    return halves.to_dual_chunks(attend(q, k, v))
