"""How the arrays of a launch are put together and taken apart: runs, rows of the batch, groups."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from pallas_kernels._masks import is_real
from pallas_kernels._spec import Ends, KeyRun, Spec, Starts


class Bounds(NamedTuple):
    """Where the sequences of queries start and end, of a batch or of one of its rows."""

    start: Starts | Int[Array, "T"]
    end: Ends | Int[Array, "T"]

    @property
    def packed(self) -> bool:
        """Whether each query has its own."""
        return self.start.ndim > 0


def joined(runs: tuple[KeyRun, ...]) -> tuple[KeyRun, ...]:
    """Runs that follow one another as one run."""
    if len(runs) == 1:
        return runs
    key = jnp.concatenate([run.key for run in runs], axis=1)
    value = jnp.concatenate([run.value for run in runs], axis=1)
    return (KeyRun(key, value, runs[0].offset),)


def split_by_runs(
    runs: tuple[KeyRun, ...], dkeys: tuple[tuple[Array, Array], ...]
) -> tuple[tuple[Array, Array], ...]:
    """Gradients of `joined` runs, run by run."""
    if len(runs) == len(dkeys):
        return dkeys
    ((dkey, dvalue),) = dkeys
    found = []
    for run in runs:
        begin = run.offset - runs[0].offset
        end = begin + run.key.shape[1]
        found.append((dkey[:, begin:end], dvalue[:, begin:end]))
    return tuple(found)


def each_row(one_row: Callable, bounds: tuple[Bounds, tuple[Int[Array, "..."], ...]]) -> Callable:
    """Maps over the batch: at once where rows share their bounds, else one after the other."""
    if bounds[0].packed:
        return lambda *args: lax.map(lambda row: one_row(*row), (bounds, *args))
    return lambda *args: jax.vmap(partial(one_row, bounds))(*args)


def without_padding(
    spec: Spec,
    runs: tuple[tuple[Array, Array], ...],
    offsets: tuple[int, ...],
    bounds: Bounds,
) -> tuple[tuple[Array, Array], ...]:
    """Pairs of [S, heads, dim] at these offsets with zeros for padding."""
    if not bounds.packed:
        return runs
    found = []
    for (key, value), offset in zip(runs, offsets, strict=True):
        real = _is_real_key(spec, bounds, offset, key.shape[0])
        key, value = (jnp.where(real[:, None, None], x, 0) for x in (key, value))
        found.append((key, value))
    return tuple(found)


def _is_real_key(spec: Spec, bounds: Bounds, offset: int, length: int) -> Bool[Array, "S"]:
    """Whether a key of a run is a token, or outside the shard one that a query may see."""
    start, end = bounds
    positions = offset + jnp.arange(length, dtype=jnp.int32)
    before = min(max(spec.first_key - offset, 0), length)
    own_begin = max(offset - spec.first_key, 0)
    own = min(length - before, max(start.shape[0] - own_begin, 0))
    own_end = None if end is None else end[own_begin : own_begin + own]
    # A query sees keys before its shard only if its sequence crosses into the shard.
    parts = [
        positions[:before] >= start[0],
        is_real(positions[before : before + own], start[own_begin : own_begin + own], own_end),
    ]
    if before + own < length:  # and keys after it only if its sequence is the last one's
        assert end is not None
        parts.append(positions[before + own :] < end[-1])
    return jnp.concatenate(parts)


def group(x: Float[Array, "T N H"], num_kv: int) -> Float[Array, "T K G H"]:
    """Query heads as groups that share a head of keys."""
    return einops.rearrange(x, "t (k g) h -> t k g h", k=num_kv)


def group_rows(x: Float[Array, "N T"], num_kv: int) -> Float[Array, "K G T"]:
    """As `group`, of one number for each head and row."""
    return einops.rearrange(x, "(k g) t -> k g t", k=num_kv)
