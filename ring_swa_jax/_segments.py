"""Where sequences start and end, on one chunk of many, from cu_seqlens or segment_ids."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import SequenceAxis, explicit_axes, mesh_of, reshard, spec_of
from ring_swa_jax._integers import as_segment_ids
from ring_swa_jax._layout import from_dual_order, to_dual_order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Starts and ends of the sequences of one chunk.

    Attributes:
        start: position of the first token of each token's sequence, relative to the chunk; one
            number where the whole row is one sequence. A padding token i has ``i + 1``.
        end: position behind the last token of each token's sequence, likewise; a padding token i
            has ``i + 1``. None: nobody asked for ends, or the row is one sequence on one device.
        crossing: global start of the sequence that the first token of each chunk is in; rows of
            a batch may share it (B or 1).
        chunk: number of tokens of the chunk.
    """

    start: Int[Array, ""] | Int[Array, "B T"]
    end: Int[Array, ""] | Int[Array, "B T"] | None
    crossing: Int[Array, "devices #B"]
    chunk: int = dataclasses.field(metadata={"static": True})

    def start_of_last(self) -> Int[Array, "B"]:
        """Start of the sequence that the chunk's last token is in, relative to the chunk."""
        return self.start[:, -1] if self.start.ndim else self.start[None]


def one_sequence(axis: SequenceAxis, chunk: int, *, ends: bool = False) -> Bounds:
    """Bounds of rows that are one sequence from end to end."""
    start = -axis.index() * chunk
    end = start + axis.size * chunk if ends and axis.size > 1 else None
    return Bounds(start, end, jnp.zeros((axis.size, 1), jnp.int32), chunk)


def from_cu_seqlens(
    axis: SequenceAxis, chunk: int, cu_seqlens: Int[Array, "n"], *, ends: bool = False
) -> Bounds:
    """Bounds of one packed row; sequence s holds positions ``cu_seqlens[s]..cu_seqlens[s+1]-1``.

    Positions outside all sequences are padding. Nothing moves: every device knows all bounds.
    """
    begin = axis.index() * chunk

    def sequence_of(position):
        """(which entry is the first behind each position, whether a sequence holds it)."""
        after = jnp.searchsorted(cu_seqlens, position, side="right", method="scan_unrolled")
        after = after.astype(jnp.int32)
        return after, (after > 0) & (after < cu_seqlens.size)

    def start_at(position):
        after, inside = sequence_of(position)
        start = cu_seqlens[jnp.clip(after - 1, 0, cu_seqlens.size - 1)]
        return jnp.where(inside, jnp.clip(start, 0, position), position + 1)

    def end_at(position):
        after, inside = sequence_of(position)
        end = cu_seqlens[jnp.clip(after, 0, cu_seqlens.size - 1)]
        return jnp.where(inside, jnp.clip(end, position + 1, axis.size * chunk), position + 1)

    positions = begin + jnp.arange(chunk, dtype=jnp.int32)
    start = start_at(positions) - begin
    end = (end_at(positions) - begin)[None] if ends else None
    crossing = start_at(jnp.arange(axis.size, dtype=jnp.int32) * chunk)
    return Bounds(start[None], end, crossing[:, None], chunk)


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


def dual_chunk_positions(segment_ids: Int[AnyArray, "B S"], devices: int) -> Int[Array, "B S"]:
    """As `segment_positions`, of tokens in dual-chunk order over so many devices."""
    segment_ids = as_segment_ids(segment_ids)
    batch, seq = spec_of(segment_ids)
    mesh = mesh_of(segment_ids) if explicit_axes(segment_ids) else None
    if mesh is not None:  # JAX neither scans nor reshapes along a dimension that is cut
        segment_ids = reshard(segment_ids, mesh, P(batch))
    positions = segment_positions(from_dual_order(segment_ids, devices))
    positions = to_dual_order(positions, devices)
    return positions if mesh is None else reshard(positions, mesh, P(batch, seq))


def from_segment_ids(
    axis: SequenceAxis, segment_ids: Int[Array, "B T"], *, ends: bool = False
) -> Bounds:
    """Bounds of packed rows cut over the axis.

    Three integers a row and device are gathered, or four with ``ends``.
    """
    chunk = segment_ids.shape[1]
    positions = jnp.arange(chunk, dtype=jnp.int32)[None]
    changes = _changes(segment_ids)
    edges = [segment_ids[:, 0], segment_ids[:, -1], jnp.where(changes, positions, 0).max(axis=1)]
    if ends:
        edges.append(jnp.where(changes, positions, chunk).min(axis=1))
    # 32 bits of an unsigned id do as well: they are only compared.
    narrow = jnp.iinfo(segment_ids.dtype).bits <= 32
    wide = jnp.dtype(jnp.int32) if narrow else segment_ids.dtype
    summary = jnp.stack([x.astype(wide) for x in edges])
    if axis.name is None:
        gathered = summary[:, None]
    else:
        gathered = jnp.moveaxis(lax.all_gather(summary, axis.name), 1, 0)
    first, last, *change = gathered
    begins_new = jnp.pad(first[1:] != last[:-1], ((1, 0), (0, 0)), constant_values=True)
    crossing = _crossing(begins_new, change[0].astype(jnp.int32), chunk)

    index = axis.index()
    here = crossing[index] - index * chunk
    starts = jnp.where(changes, positions, here[:, None])
    padding = segment_ids < 0
    starts = jnp.where(padding, positions + 1, lax.cummax(starts, axis=1))
    if not ends:
        return Bounds(starts, None, crossing, chunk)
    end = _end_of_last(begins_new, change[1].astype(jnp.int32), chunk)[index] - index * chunk
    following = jnp.where(changes, positions, end[:, None])
    following = jnp.concatenate([following[:, 1:], end[:, None]], axis=1)
    found = jnp.where(padding, positions + 1, lax.cummin(following, axis=1, reverse=True))
    return Bounds(starts, found, crossing, chunk)


def _crossing(
    begins_new: Bool[Array, "devices B"], last_change: Int[Array, "devices B"], chunk: int
) -> Int[Array, "devices B"]:
    """Global start of the sequence that the first token of each chunk is in.

    Args:
        begins_new: whether a chunk begins a sequence.
        last_change: the last token of each chunk, but its first, that begins a sequence, or 0.
        chunk: number of tokens of a chunk.
    """
    chunk_begins = jnp.arange(begins_new.shape[0], dtype=jnp.int32)[:, None] * chunk
    new_start = jnp.where(begins_new, chunk_begins, 0)
    new_start = jnp.where(last_change > 0, chunk_begins + last_change, new_start)
    start_of_last = lax.cummax(new_start, axis=0)
    carried = jnp.concatenate([jnp.zeros_like(start_of_last[:1]), start_of_last[:-1]])
    return jnp.where(begins_new, chunk_begins, carried)


def _end_of_last(
    begins_new: Bool[Array, "devices B"], first_change: Int[Array, "devices B"], chunk: int
) -> Int[Array, "devices B"]:
    """Global end of the sequence that the last token of each chunk is in.

    Args:
        begins_new: whether a chunk begins a sequence.
        first_change: the first token of each chunk, but its first, that begins a sequence, or
            ``chunk``.
        chunk: number of tokens of a chunk.
    """
    devices = begins_new.shape[0]
    length = devices * chunk
    chunk_begins = jnp.arange(devices, dtype=jnp.int32)[:, None] * chunk
    begin = jnp.where(first_change < chunk, chunk_begins + first_change, length)
    begin = jnp.where(begins_new, chunk_begins, begin)
    begin = lax.cummin(begin, axis=0, reverse=True)
    return jnp.concatenate([begin[1:], jnp.full_like(begin[:1], length)])


def without_padding(
    x: Float[Array, "B S R D"], start: Int[Array, "B S"], first: int = 0
) -> Float[Array, "B S R D"]:
    """``x`` with zeros for padding, which other devices do not know of.

    ``start`` is that of `Bounds`, for these tokens; the first one has the position ``first``.
    """
    real = start <= first + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return jnp.where(real[..., None, None], x, jnp.zeros_like(x))


def bounds_of(
    axis: SequenceAxis,
    chunk: int,
    cu_seqlens: Int[Array, "n"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    ends: bool = False,
) -> Bounds:
    """Bounds of one chunk, by what says where the sequences are; neither: rows are one sequence.

    Ends are wanted where a window reaches past a query.
    """
    if cu_seqlens is not None:
        return from_cu_seqlens(axis, chunk, cu_seqlens, ends=ends)
    if segment_ids is not None:
        return from_segment_ids(axis, segment_ids, ends=ends)
    return one_sequence(axis, chunk, ends=ends)


def whole_bounds(
    axis: SequenceAxis,
    chunk: int,
    cu_seqlens: Int[Array, "n"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    ends: bool = False,
) -> tuple[Int[Array, ""] | Int[Array, "B S"], Int[Array, "B S"] | None]:
    """(start, end) of each token's sequence in whole rows; only what segment_ids say is gathered.

    ``end`` is None where nobody asks for it, and where the row is one sequence.
    """
    if segment_ids is None:
        whole = SequenceAxis(None, 1)
        bounds = bounds_of(whole, axis.size * chunk, cu_seqlens, None, ends=ends)
        return bounds.start, bounds.end
    bounds = from_segment_ids(axis, segment_ids, ends=ends)

    def gathered(positions):
        positions = positions + axis.index() * chunk
        return lax.all_gather(positions, axis.name, axis=1, tiled=True)

    return gathered(bounds.start), None if bounds.end is None else gathered(bounds.end)
