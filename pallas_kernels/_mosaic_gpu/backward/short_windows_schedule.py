"""Which tiles a program of the backward kernel for short windows computes, and where they are.

A program has one head of keys and a chunk of consecutive tiles. It goes from one tile of queries to
the next, and at each through all query heads of the group. A window reaches back at most
`MAX_TILES_BACK` tiles, so all keys that a tile of queries sees fit into shared memory.

Neighbouring chunks share nothing. A program computes again what its neighbours compute too: of the
`MAX_TILES_BACK` tiles of keys before its chunk, and of as many tiles of queries after it.

Where the first key is not at the position of the first query, tiles of queries are counted from
that of the first key, so that a tile of queries sees the tiles of keys of its own number and of
those before it in any case.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Bool

from pallas_kernels._mosaic_gpu.primitives import ROWS, Index
from pallas_kernels._spec import minus, plus

TILE = ROWS
"""Queries of a tile, and keys."""


MAX_TILES_BACK = 2
"""Tiles of keys before a tile of queries that its windows reach."""


LONGEST_WINDOW = MAX_TILES_BACK * TILE
"""Where keys begin at the position of a tile of queries."""


CONSUMERS = MAX_TILES_BACK + 1
"""Warpgroups that compute, each with one of the tiles of keys that a tile of queries sees."""


SLOTS = 3
"""Tiles of queries in shared memory."""


KEY_SLOTS = CONSUMERS + 1
"""Tiles of keys in shared memory: those that a tile of queries sees, and the next one."""


class Chunk(NamedTuple):
    """What a program computes.

    Attributes:
        row: of the batch.
        kv_head: head of keys.
        first: first tile of keys and of queries.
        end: end of the tiles whose gradients the program writes.
        stop: end of the tiles of queries that see these keys.
    """

    row: Index
    kv_head: Index
    first: Index
    end: Index
    stop: Index


@dataclasses.dataclass(frozen=True)
class ShortSchedule:
    """What all programs of a launch have in common.

    Attributes:
        num_kv_heads: heads of keys.
        group_size: query heads of each.
        batch_kv_heads: heads of keys in all rows of the batch.
        num_tiles: tiles of the sequence, counted from the first key's to the last query's.
        chunk: tiles of a chunk.
        packed: whether there are documents.
        has_ends: whether some keys are behind the end of a query's document.
        num_keys: all keys.
        offset: position of the first key.
    """

    num_kv_heads: int
    group_size: int
    batch_kv_heads: int
    num_tiles: int
    chunk: int
    packed: bool
    has_ends: bool
    num_keys: int
    offset: int

    @property
    def tiles_before_queries(self) -> int:
        """Tiles that are counted before that of the first query."""
        return tiles_before_queries(self.offset)

    def query_tile(self, query_block: Index) -> Index:
        """The tile of queries of this number, counted from the first query's; negative: none."""
        return minus(query_block, self.tiles_before_queries)

    def copied_query_tile(self, query_block: Index) -> Index:
        """As `query_tile`, but the first query's tile stands for one that does not exist."""
        tile = self.query_tile(query_block)
        return jnp.maximum(tile, 0) if self.tiles_before_queries else tile

    def is_written(self, query_block: Index, chunk: Chunk) -> Bool[Array, ""]:
        """Whether the chunk's program writes the gradients of a tile of queries."""
        before, written = self.tiles_before_queries, query_block < chunk.end
        return written & (query_block >= before) if before else written

    def first_key(self, key_block: Index) -> Index:
        """Position of the first key of a tile."""
        return plus(key_block * TILE, self.offset)

    @property
    def programs(self) -> int:
        """How many there are."""
        return self.batch_kv_heads * pl.cdiv(self.num_tiles, self.chunk)

    def program_chunk(self) -> Chunk:
        """What the program that asks computes."""
        index = lax.axis_index("program")
        batch_kv_head = lax.rem(index, jnp.int32(self.batch_kv_heads))
        first = lax.div(index, jnp.int32(self.batch_kv_heads)) * self.chunk
        end = jnp.minimum(first + self.chunk, self.num_tiles)
        stop = jnp.minimum(end + MAX_TILES_BACK, self.num_tiles)
        num_kv_heads = jnp.int32(self.num_kv_heads)
        row, kv_head = lax.div(batch_kv_head, num_kv_heads), lax.rem(batch_kv_head, num_kv_heads)
        return Chunk(row, kv_head, first, end, stop)


def tiles_before_queries(offset: int) -> int:
    """Tiles from the first key's to the first query's, for keys that begin at this position."""
    return pl.cdiv(-offset, TILE)


def reaches(window: int, offset: int) -> bool:
    """Whether `MAX_TILES_BACK` tiles of keys before a tile of queries hold its windows."""
    beyond = tiles_before_queries(offset) * TILE + offset
    return offset <= 0 and window + beyond <= LONGEST_WINDOW


def chunk_tiles(num_tiles: int, batch_kv_heads: int, num_sms: int) -> int:
    """Tiles of a chunk: those with which the multiprocessors are done first.

    Args:
        num_tiles: tiles of the sequence.
        batch_kv_heads: heads of keys in all rows of the batch.
        num_sms: multiprocessors of the GPU.
    """

    def cost(chunk):
        programs = batch_kv_heads * pl.cdiv(num_tiles, chunk)
        waves = pl.cdiv(programs, num_sms)
        return waves * (min(chunk, num_tiles) + MAX_TILES_BACK), programs

    return min(range(1, num_tiles + 1), key=cost)


def key_block_of(query_block: Index, consumer: int | Index) -> Index:
    """Number of the tile of keys that a consumer has at a tile of queries.

    A consumer keeps a tile until no query sees it. Then it takes the tile `CONSUMERS` later, whose
    first queries are at hand. Numbers before the sequence, from -`MAX_TILES_BACK` on, stand for
    tiles that no query sees.
    """
    return query_block - lax.rem(query_block - consumer + CONSUMERS, jnp.int32(CONSUMERS))


def key_slot(key_block: Index) -> Index:
    """The slot in shared memory of a tile of keys."""
    return lax.rem(key_block + KEY_SLOTS, jnp.int32(KEY_SLOTS))
