"""What the kernels are asked to compute: static settings and the arrays around them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyRun:
    """Keys and values at the consecutive positions ``offset, offset + 1, ...``.

    Positions count from the shard's first query, see `Spec`. Where a backend takes a batch row by
    row, a row's keys have no axis B.
    """

    key: Float[Array, "*B S K H"]
    value: Float[Array, "*B S K Hv"]
    offset: int = dataclasses.field(metadata={"static": True})


class SinkRun(NamedTuple):
    """The first tokens of the sequence that crosses into the shard, in float32.

    Slot p stands at position ``start[:, 0] + p``; slots from the shard's first key on are ignored.
    The axis B is as that of `KeyRun`.
    """

    key: Float[Array, "*B P K H"]
    value: Float[Array, "*B P K Hv"]


class State(NamedTuple):
    """Attention over the keys seen so far: what one launch leaves to the next.

    ``lse`` is the natural log of the softmax denominator, the learned sink included, and -inf for
    a query that has seen no key.
    """

    out: Float[Array, "B T N Hv"]
    lse: Float[Array, "B N T"]


Starts = Int[Array, ""] | Int[Array, "B T"]
"""Position of the first key of each query's sequence: one for all, or one a query."""

Ends = Int[Array, ""] | Int[Array, "B T"] | None
"""Position behind the last key of each query's sequence; None: no key is behind that."""

Slots = tuple[Float[Array, "B K _ H"], Float[Array, "B K _ Hv"]]
"""Keys and values with heads first, as a cache has them: the rolling buffer's, or the sinks'."""

SlotBounds = Int[Array, "B 4"]
"""Which slots the one query of each row sees.

The slot of the last key in the rolling buffer; how far before that slot, going round the buffer,
the first key in the window is, negative for none; how many of the sinks; 0.
"""


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static settings of one attention call.

    Kernels know only windows that end with the query. Where a query sees keys after itself, keys
    are counted from ``lookahead`` positions earlier: the shard's key j has the position
    ``j - lookahead``. So the L keys before a query, itself and the R after it are at the positions
    of the ``L + R`` keys before the query and of its own, with ``lookahead=R``.

    Attributes:
        window: W; a query sees the keys at its own position and at the W before it; None: at all
            positions before it.
        num_sinks: first tokens of its sequence that a query always sees.
        scale: factor of ``q.k``.
        soft_cap: bound of ``cap * tanh(logit / cap)``, or None.
        precision: of float32 matrix products, as ``jax.lax.dot_general`` names it.
        lookahead: how many positions keys are moved to the front.
    """

    window: int | None
    num_sinks: int
    scale: float
    soft_cap: float | None
    precision: str | None
    lookahead: int = 0

    @property
    def first_key(self) -> int:
        """Position of the shard's own first key."""
        return -self.lookahead

    @property
    def keys_before(self) -> int | None:
        """How many keys before a query its window holds; None: all."""
        return None if self.window is None else self.window - self.lookahead

    def sinks_in(self, offset: int) -> int:
        """Sinks to look for in the run at ``offset``: only the shard's own keys hold any.

        Those before the shard come as a `SinkRun`; the halo holds window keys.
        """
        return self.num_sinks if offset == self.first_key else 0

    def moved_run(self, run: KeyRun) -> KeyRun:
        """A run whose position is relative to the shard, at the position that kernels give it."""
        return dataclasses.replace(run, offset=run.offset - self.lookahead)

    def moved(self, start: Starts, end: Ends) -> tuple[Starts, Ends]:
        """Starts and ends that are relative to the shard, at the positions of the moved keys."""
        if not self.lookahead:
            return start, end
        return start - self.lookahead, None if end is None else end - self.lookahead


def plus(x: Int[Array, "..."], distance: int) -> Int[Array, "..."]:
    """``x + distance``; where that is 0, as under causal windows, no instruction."""
    return x + distance if distance else x


def minus(x: Int[Array, "..."], distance: int) -> Int[Array, "..."]:
    """``x - distance``, as `plus`."""
    return x - distance if distance else x


def accumulator_dtype(dtype) -> jnp.dtype:
    """float32 for half precision and float32, float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
