"""Where the sequence of each token starts, from cu_seqlens or segment_ids, on one chunk of many."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Int

from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import SequenceAxis, explicit_axes, mesh_of, reshard, spec_of
from ring_swa_jax._integers import as_segment_ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Starts of the sequences of one chunk.

    Attributes:
        start: position of the first token of each token's sequence, relative to the chunk; one
            number where the whole row is one sequence. A padding token i has ``i + 1``.
        crossing: global start of the sequence that the first token of each chunk is in; rows of
            a batch may share it (B or 1).
        chunk: number of tokens of the chunk.
    """

    start: Int[Array, ""] | Int[Array, "B T"]
    crossing: Int[Array, "devices #B"]
    chunk: int = dataclasses.field(metadata={"static": True})

    def start_of_last(self) -> Int[Array, "B"]:
        """Start of the sequence that the chunk's last token is in, relative to the chunk."""
        return self.start[:, -1] if self.start.ndim else self.start[None]


def one_sequence(axis: SequenceAxis, chunk: int) -> Bounds:
    """Bounds of rows that are one sequence from end to end."""
    start = -axis.index() * chunk
    return Bounds(start, jnp.zeros((axis.size, 1), jnp.int32), chunk)


def from_cu_seqlens(axis: SequenceAxis, chunk: int, cu_seqlens: Int[Array, "n"]) -> Bounds:
    """Bounds of one packed row; sequence s holds positions ``cu_seqlens[s]..cu_seqlens[s+1]-1``.

    Positions outside all sequences are padding. Nothing moves: every device knows all bounds.
    """
    begin = axis.index() * chunk

    def start_at(position):
        after = jnp.searchsorted(cu_seqlens, position, side="right", method="scan_unrolled")
        after = after.astype(jnp.int32)
        start = cu_seqlens[jnp.clip(after - 1, 0, cu_seqlens.size - 1)]
        inside = (after > 0) & (after < cu_seqlens.size)
        return jnp.where(inside, jnp.clip(start, 0, position), position + 1)

    start = start_at(begin + jnp.arange(chunk, dtype=jnp.int32)) - begin
    crossing = start_at(jnp.arange(axis.size, dtype=jnp.int32) * chunk)
    return Bounds(start[None], crossing[:, None], chunk)


def segment_starts(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of the first token of each token's segment in its row; i + 1 for padding token i."""
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = lax.cummax(jnp.where(_changes(segment_ids), positions, 0), axis=1)
    return jnp.where(segment_ids < 0, positions + 1, starts)


def _changes(segment_ids: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """Where the id is another than the token's before; False for the first token."""
    before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    return segment_ids != before


def segment_positions(segment_ids: Int[AnyArray, "B S"]) -> Int[Array, "B S"]:
    """Position of each token inside its own sequence.

    Args:
        segment_ids: whole rows, of any integer dtype; a new sequence starts where the id changes,
            and a negative id is padding.

    Returns:
        int32 positions from 0, restarting with each sequence; 0 for padding.

    Raises:
        ValueError: ids that are not [B, S].
        TypeError: ids that are not integers.
    """
    segment_ids = as_segment_ids(segment_ids)
    batch, seq = spec_of(segment_ids)
    mesh = mesh_of(segment_ids) if explicit_axes(segment_ids) else None
    if mesh is not None:  # JAX does not scan along a dimension that is cut
        segment_ids = reshard(segment_ids, mesh, P(batch))
    positions = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    positions = jnp.maximum(positions - segment_starts(segment_ids), 0)
    return positions if mesh is None else reshard(positions, mesh, P(batch, seq))


def from_segment_ids(axis: SequenceAxis, segment_ids: Int[Array, "B T"]) -> Bounds:
    """Bounds of packed rows cut over the axis; three integers a row and device are gathered."""
    chunk = segment_ids.shape[1]
    positions = jnp.arange(chunk, dtype=jnp.int32)[None]
    changes = _changes(segment_ids)
    last_change = jnp.max(jnp.where(changes, positions, 0), axis=1)
    # 32 bits of an unsigned id do as well: they are only compared.
    narrow = jnp.iinfo(segment_ids.dtype).bits <= 32
    wide = jnp.dtype(jnp.int32) if narrow else segment_ids.dtype
    ends = (segment_ids[:, 0], segment_ids[:, -1], last_change)
    summary = jnp.stack([x.astype(wide) for x in ends])
    if axis.name is None:
        first, last, change = summary[:, None]
    else:
        first, last, change = jnp.moveaxis(lax.all_gather(summary, axis.name), 1, 0)
    change = change.astype(jnp.int32)
    chunk_begins = jnp.arange(axis.size, dtype=jnp.int32)[:, None] * chunk
    begins_new = jnp.pad(first[1:] != last[:-1], ((1, 0), (0, 0)), constant_values=True)
    new_start = jnp.where(change > 0, chunk_begins + change, jnp.where(begins_new, chunk_begins, 0))
    start_of_last = lax.cummax(new_start, axis=0)
    carried = jnp.concatenate([jnp.zeros_like(start_of_last[:1]), start_of_last[:-1]])
    crossing = jnp.where(begins_new, chunk_begins, carried)

    index = axis.index()
    here = crossing[index] - index * chunk
    starts = jnp.where(changes, positions, here[:, None])
    starts = jnp.where(segment_ids < 0, positions + 1, lax.cummax(starts, axis=1))
    return Bounds(starts, crossing, chunk)
