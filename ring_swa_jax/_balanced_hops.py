"""Which keys of each hop of a balanced ring a device's pair of half chunks sees.

An upper half chunk sees the lower half chunk of every pair, and the upper one of a pair that is
smaller than its own; a lower half chunk sees smaller lower ones. So every hop computes two blocks
of half a chunk by half a chunk, or one where the other is within a chunk of the caller's.

Arrays hold the upper half chunk of a pair before the lower one. Then the keys that a query sees in
a hop are the last ones, and where they start, seen from query to query, only moves forward.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, Shaped

from ring_swa_jax._half_chunk_pairs import Pairs


@dataclasses.dataclass(frozen=True)
class HopsOfOneSequence:
    """One launch for all queries of a device and all keys of a hop, where there are no documents.

    Attributes:
        pairs: of half chunks.
        batch: B.
    """

    pairs: Pairs
    batch: int

    def rows(self, x: Shaped[Array, "B T *_"]) -> Shaped[Array, "B T *_"]:
        """Queries of a pair, as a launch takes them."""
        return x

    def from_rows(self, x: Shaped[Array, "B T *_"]) -> Shaped[Array, "B T *_"]:
        """The inverse of `rows`."""
        return x

    def keys(self, keys: Float[Array, "B T K D"], distance) -> Float[Array, "B T K D"]:
        """Keys of a hop, as a launch takes them: before the queries, the visible ones last."""
        del distance
        return keys

    def keys_gradient(self, dkeys: Float[Array, "B T K D"], distance) -> Float[Array, "B T K D"]:
        """The gradient of the keys of a hop, from what a launch leaves."""
        del distance
        return dkeys

    def starts(self, distance: Int[Array, ""] | int) -> Int[Array, "B T"]:
        """The first key that each query sees, counted from behind the last key."""
        pairs, halves = self.pairs, self.pairs.halves
        index = pairs.axis.index()
        upper, lower = pairs.numbers(index)
        upper_key, lower_key = pairs.numbers((index - distance) % pairs.axis.size)
        length = halves.length(lower_key)
        from_upper = jnp.where(pairs.sees(upper, lower_key), length, 0)
        from_upper = jnp.where(pairs.sees(upper, upper_key), pairs.chunk, from_upper)
        from_lower = jnp.where(pairs.sees(lower, lower_key), length, 0)
        rows = jnp.arange(pairs.chunk, dtype=jnp.int32)
        seen = jnp.where(rows < halves.length(upper), from_upper, from_lower)
        return jnp.broadcast_to(-seen, (self.batch, pairs.chunk))


@dataclasses.dataclass(frozen=True)
class HopsOfDocuments:
    """Two rows of a launch's batch for the two half chunks of a device, where there are documents.

    The documents of the upper half chunk may start behind those of the lower one, whatever their
    order. A row of the shorter half chunk ends with a query that sees nothing.

    Attributes:
        pairs: of half chunks.
        start: where the document of each token of the whole sequence starts.
    """

    pairs: Pairs
    start: Int[Array, "B S"]

    def rows(self, x: Shaped[Array, "B T *_"]) -> Shaped[Array, "R half *_"]:
        """Queries of a pair, as a launch takes them."""
        half = self.pairs.halves.longest
        if self.pairs.chunk % 2:
            x = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], 1)
            lower = lax.dynamic_slice_in_dim(x, self._upper_length(), half, 1)
            x = jnp.concatenate([x[:, :half], lower], 1)
        return x.reshape(-1, half, *x.shape[2:])

    def from_rows(self, x: Shaped[Array, "R half *_"]) -> Shaped[Array, "B T *_"]:
        """The inverse of `rows`."""
        half = self.pairs.halves.longest
        x = x.reshape(-1, 2 * half, *x.shape[2:])
        if self.pairs.chunk % 2 == 0:
            return x
        x = lax.dynamic_update_slice_in_dim(x, x[:, half:], self._upper_length(), 1)
        return x[:, : self.pairs.chunk]

    def keys(
        self, keys: Float[Array, "B T K D"], distance: Int[Array, ""] | int
    ) -> Float[Array, "R T K D"]:
        """Keys of a hop, as a launch takes them: before the queries, the visible ones last.

        An upper half chunk that sees both half chunks of keys sees them in their order.
        """
        turned = self._turned(keys, self._shift(distance))
        return jnp.stack([turned, keys], 1).reshape(-1, *keys.shape[1:])

    def keys_gradient(
        self, dkeys: Float[Array, "R T K D"], distance: Int[Array, ""] | int
    ) -> Float[Array, "B T K D"]:
        """The gradient of the keys of a hop, from what a launch leaves."""
        turned, dkeys = jnp.moveaxis(dkeys.reshape(-1, 2, *dkeys.shape[1:]), 1, 0)
        return dkeys + self._turned(turned, self.pairs.chunk - self._shift(distance))

    def starts(self, distance: Int[Array, ""] | int) -> Int[Array, "R half"]:
        """The first key that each query sees, counted from behind the last key."""
        pairs = self.pairs
        index = pairs.axis.index()
        keys = pairs.numbers((index - distance) % pairs.axis.size)
        seen = []
        for query in pairs.numbers(index):
            start = self._starts_of(query)
            seen.append(sum((self._keys_seen(query, key, start) for key in keys), jnp.int32(0)))
        return -jnp.stack(seen, 1).reshape(-1, pairs.halves.longest)

    def _keys_seen(self, query: Array, key: Array, start: Int[Array, "B half"]) -> Array:
        """How many keys of a half chunk each query of another one sees."""
        halves = self.pairs.halves
        length = halves.length(key)
        seen = length - jnp.clip(start - halves.begin(key), 0, length)
        return jnp.where(self.pairs.sees(query, key), seen, 0)

    def _starts_of(self, query: Array) -> Int[Array, "B half"]:
        """Where the documents of a half chunk's tokens start; for a row too many, past all keys."""
        halves = self.pairs.halves
        past_all = self.pairs.axis.size * self.pairs.chunk
        start = jnp.pad(self.start, ((0, 0), (0, 1)), constant_values=past_all)
        start = lax.dynamic_slice_in_dim(start, halves.begin(query), halves.longest, 1)
        rows = jnp.arange(halves.longest, dtype=jnp.int32)
        return jnp.where(rows < halves.length(query), start, past_all)

    def _shift(self, distance: Int[Array, ""] | int) -> Int[Array, ""]:
        """How far the keys are turned for the upper half chunk."""
        pairs = self.pairs
        index = pairs.axis.index()
        upper, _ = pairs.numbers(index)
        upper_key, _ = pairs.numbers((index - distance) % pairs.axis.size)
        return jnp.where(pairs.sees(upper, upper_key), pairs.halves.length(upper_key), 0)

    def _turned(self, x: Array, shift: Int[Array, ""]) -> Array:
        """``x`` with its first ``shift`` tokens moved to the end."""
        twice = jnp.concatenate([x, x], 1)
        return lax.dynamic_slice_in_dim(twice, shift, self.pairs.chunk, 1)

    def _upper_length(self) -> Int[Array, ""]:
        upper, _ = self.pairs.numbers(self.pairs.axis.index())
        return self.pairs.halves.length(upper)


Hops = HopsOfOneSequence | HopsOfDocuments
