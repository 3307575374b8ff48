"""Keys before the shard, which other devices hold: how they come, and where they stand."""

from typing import Protocol

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels._order import exists
from pallas_kernels._spec import KeyRun, Starts

# Keys and values, or their gradients, of one run: each run has a length of its own.
KeyValue = tuple[Float[Array, "B _ K H"], Float[Array, "B _ K Hv"]]


class Halo(Protocol):
    """Keys before the shard, which other devices hold; hop 0 is the nearest. Hashable.

    ``lengths[c]`` is the number of keys of hop c. The keys of hop c end just before those of
    hop c - 1. Every hop but the last is as long as the shard.
    """

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of keys of each hop."""
        ...

    def fetch(
        self,
        hop: int,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K Hv"],
        start: Starts,
        *,
        after: Float[Array, ""] | None,
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """The keys and values of a hop: every shard passes its own, and where its sequences start.

        The message is sent once the number ``after`` exists. The sender sets padding to zero,
        because the receiver does not know which rows are padding.
        """
        ...

    def give_back(
        self, hop: int, dkey: Float[Array, "B S K H"], dvalue: Float[Array, "B S K Hv"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """The transpose of `fetch`.

        Sends a hop's gradients to the device that holds these keys.
        """
        ...


def hop_run(halo: Halo, hop: int, fetched: KeyValue) -> KeyRun:
    """The run of a hop's keys."""
    key, value = fetched
    return KeyRun(key, value, -sum(halo.lengths[: hop + 1]))


def fetch_in_turn(
    halo: Halo,
    hop: int,
    done: list[Array],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    start: Starts,
) -> KeyValue:
    """Fetches a hop when the hop before the last is done, so that two are in flight."""
    return halo.fetch(hop, key, value, start, after=done[-2] if len(done) > 1 else None)


def only_after(lse: Float[Array, "B N T"], row: int, fetched: KeyValue) -> KeyValue:
    """The fetched keys and values, once a launch has computed the log-sum-exp of a row.

    So what reads the fetched keys comes after that launch, which the transfer then overlaps with.
    """
    done = exists(lse[0, 0, row])
    key, value = (jnp.where(done, x, jnp.nan) for x in fetched)
    return key, value


def add_last(longer: KeyValue, shorter: KeyValue | None) -> KeyValue:
    """Adds keys' gradients to those of the last keys of a longer run."""
    if shorter is None:
        return longer
    (key, value), (last_key, last_value) = longer, shorter
    begin = key.shape[1] - last_key.shape[1]
    if begin == 0:  # as .at[0:] it would crash the compiler of jax 0.11.2, inside shard_map
        return key + last_key, value + last_value
    return key.at[:, begin:].add(last_key), value.at[:, begin:].add(last_value)


def add_first(longer: KeyValue, shorter: KeyValue) -> KeyValue:
    """Adds keys' gradients to those of the first keys of a longer run."""
    (key, value), (first_key, first_value) = longer, shorter
    end = first_key.shape[1]
    if end == key.shape[1]:
        return key + first_key, value + first_value
    return key.at[:, :end].add(first_key), value.at[:, :end].add(first_value)
