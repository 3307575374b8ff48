"""Attention in chunks of a fixed size: each chunk becomes a document of its own."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._integers import as_segment_ids
from ring_swa_jax._segments import segment_positions


def chunk_segment_ids(segment_ids: Int[AnyArray, "B S"], chunk_size: int) -> Int[Array, "B S"]:
    """``segment_ids`` that cut every document into chunks, for attention as in Llama 4.

    The query at position p of its document attends the keys from the chunk's first position
    ``p - p % chunk_size`` on. Each document starts with a new chunk. Rotary positions still count
    from the document's first token: compute them from the original ids,
    ``segment_positions(segment_ids)``.

    Args:
        segment_ids: of the documents; zeros where each row is one. A negative id is padding.
        chunk_size: tokens of a chunk. Static.

    Returns:
        int32 ids that change where a document or a chunk begins; -1 for padding.

    Raises:
        ValueError: ids that are not [B, S], or a size below 1.
        TypeError: ids that are not integers, or a size that is not a static integer.
    """
    size = _checks.static_size("chunk_size", chunk_size)
    segment_ids = as_segment_ids(segment_ids)
    positions = segment_positions(segment_ids)
    first = jnp.arange(segment_ids.shape[1], dtype=jnp.int32) - positions % size
    return jnp.where(segment_ids < 0, -1, first)
