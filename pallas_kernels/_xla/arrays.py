"""How the arrays of a launch are put together and taken apart: runs, rows of the batch, heads."""

from typing import NamedTuple

import einops
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from pallas_kernels._masks import is_real
from pallas_kernels._spec import Ends, KeyRun, Spec, Starts


class Bounds(NamedTuple):
    """Where the sequences of queries start and end."""

    start: Starts
    end: Ends

    @property
    def packed(self) -> bool:
        """Whether each query has its own."""
        return self.start.ndim > 0


def joined(runs: tuple[KeyRun, ...]) -> KeyRun:
    """Runs that follow one another as one run."""
    if len(runs) == 1:
        return runs[0]
    key = jnp.concatenate([run.key for run in runs], axis=1)
    value = jnp.concatenate([run.value for run in runs], axis=1)
    return KeyRun(key, value, runs[0].offset)


def split_by_runs(
    runs: tuple[KeyRun, ...], dkey: Float[Array, "B S K H"], dvalue: Float[Array, "B S K Hv"]
) -> tuple[tuple[Array, Array], ...]:
    """Gradients of `joined` runs, run by run."""
    found = []
    for run in runs:
        begin = run.offset - runs[0].offset
        end = begin + run.key.shape[1]
        found.append((dkey[:, begin:end], dvalue[:, begin:end]))
    return tuple(found)


def without_padding(
    spec: Spec, offset: int, bounds: Bounds, arrays: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Arrays [B, S, heads, dim] of the tokens from position ``offset`` on, padding as zeros."""
    if not bounds.packed:
        return arrays
    real = _is_real_key(spec, bounds, offset, arrays[0].shape[1])[..., None, None]
    return tuple(jnp.where(real, x, 0) for x in arrays)


def _is_real_key(spec: Spec, bounds: Bounds, offset: int, length: int) -> Bool[Array, "B S"]:
    """Whether a key of a run is a token, or outside the shard one that a query may see."""
    start, end = bounds
    positions = offset + jnp.arange(length, dtype=jnp.int32)[None]
    before = min(max(spec.first_key - offset, 0), length)
    own_begin = max(offset - spec.first_key, 0)
    own = min(length - before, max(start.shape[1] - own_begin, 0))
    own_start = start[:, own_begin : own_begin + own]
    own_end = None if end is None else end[:, own_begin : own_begin + own]
    # A query sees keys before its shard only if its sequence crosses into the shard.
    parts = [
        positions[:, :before] >= start[:, :1],
        is_real(positions[:, before : before + own], own_start, own_end),
    ]
    if before + own < length:  # and keys after it only if its sequence is the last one's
        assert end is not None
        parts.append(positions[:, before + own :] < end[:, -1:])
    return jnp.concatenate(parts, axis=1)


def group(x: Float[Array, "B T N H"], num_kv: int) -> Float[Array, "B T K G H"]:
    """Query heads as groups that share a head of keys."""
    return einops.rearrange(x, "b t (k g) h -> b t k g h", k=num_kv)


def group_rows(x: Float[Array, "B N T"], num_kv: int) -> Float[Array, "B K G T"]:
    """As `group`, of one number for each head and row."""
    return einops.rearrange(x, "b (k g) t -> b k g t", k=num_kv)


def heads_first(x: Float[Array, "B Q K G H"]) -> Float[Array, "B K GQ H"]:
    """A tile of queries: the rows of a group's heads are one matrix."""
    return einops.rearrange(x, "b q k g h -> b k (g q) h")


def rows_first(x: Float[Array, "B K GQ H"], groups: int) -> Float[Array, "B Q K G H"]:
    """The inverse of `heads_first`."""
    return einops.rearrange(x, "b k (g q) h -> b q k g h", g=groups)


def take_rows(
    x: Shaped[Array, "..."], begin: Int[Array, ""] | int, size: int, axis: int
) -> Shaped[Array, "..."]:
    """``size`` rows of an array, from a row on that is not negative."""
    return lax.dynamic_slice_in_dim(x, begin, size, axis, allow_negative_indices=False)


def put_rows(
    x: Shaped[Array, "*whole"], new: Shaped[Array, "*part"], begin: Int[Array, ""] | int, axis: int
) -> Shaped[Array, "*whole"]:
    """An array with new rows from a row on that is not negative."""
    begin = jnp.asarray(begin)
    starts = [jnp.zeros_like(begin)] * x.ndim  # of one dtype, also under x64
    starts[axis] = begin
    return lax.dynamic_update_slice(x, new, starts, allow_negative_indices=False)
