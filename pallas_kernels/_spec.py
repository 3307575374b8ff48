"""What the kernels are asked to compute: static settings and the arrays around them."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static settings of one attention call.

    Attributes:
        window: W; a query sees the W keys before it and itself; None: all keys before it.
        num_sinks: first tokens of its sequence that a query always sees.
        scale: factor of ``q.k``.
        soft_cap: bound of ``cap * tanh(logit / cap)``, or None.
        precision: of float32 matrix products, as ``jax.lax.dot_general`` names it.
    """

    window: int | None
    num_sinks: int
    scale: float
    soft_cap: float | None
    precision: str | None

    def sinks_in(self, offset: int) -> int:
        """Sinks to look for in the run at ``offset``: only the shard's own keys hold any.

        Those before the shard come as a `SinkRun`; the halo holds window keys.
        """
        return self.num_sinks if offset == 0 else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyRun:
    """Keys and values at the consecutive positions ``offset, offset + 1, ...`` of a shard.

    Those of one row of the batch, which some kernels take by itself, have no axis B.
    """

    key: Float[Array, "*B S K H"]
    value: Float[Array, "*B S K Hv"]
    offset: int = dataclasses.field(metadata={"static": True})


class SinkRun(NamedTuple):
    """The first tokens of the sequence that crosses into the shard, in float32.

    Slot p stands at position ``start[:, 0] + p``; slots at positions >= 0 are not looked at. Those
    of one row of the batch, which some kernels take by itself, have no axis B.
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
"""Position of the first token of each query's sequence: one for all, or one a query."""


def accumulator_dtype(dtype) -> jnp.dtype:
    """float32 for half precision and float32, float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
