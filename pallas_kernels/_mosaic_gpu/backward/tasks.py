"""The tasks of a fused Mosaic GPU backward launch: which programs there are, and in which order.

A *task* is a tile of keys with all heads of its group: the query heads that share a head of keys.
Names: ``key_block`` and ``query_block`` are the numbers of a tile of keys and of a tile of queries
(FlashAttention's n_block and m_block); *own* keys are the shard's, as opposed to a halo's.

Several programs add to the gradients of a query, in a fixed order, so that results repeat their
bits. The order of programs and of their steps (`scheduler`) is chosen so that they rarely wait for
each other:

- As a rule the program with the last keys adds first. A program starts at the query tile on its
  diagonal and moves to later ones. Concurrent programs therefore come to a query tile one by one,
  in the order in which they must add. They go through one head after the other, so that what they
  read and add stays in the L2 cache.
- Without a window and documents the first keys have the most queries. Their programs come first, of
  several heads at once, so that no long program is left for the end. All go from the last queries
  to the first, and through all heads of the group at each tile, so that programs that started
  together are at the same queries.
- Where a window reaches far before a short shard, all programs of a halo's keys would begin at the
  shard's first queries, and wait for each other. These programs then start after those of the own
  keys of all heads, the first keys first. They go from the last queries to the first, so that they
  too come to a query tile one by one (`BackwardSchedule.halo_last`).
- Where queries see all of their documents, all programs of a document begin at its first query and
  wait for each other there. So programs of several heads alternate: few of one head run at once.

A program waits only for programs with lower indices, which the GPU has started before it.

At the end of a launch some multiprocessors would be idle while the last tasks run. So some tasks
are split into parts of fewer heads, each of which is a program; or into parts of fewer queries,
where all queries see all keys (`task_splits`).
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from pallas_kernels._masks import sees_all_keys
from pallas_kernels._mosaic_gpu.primitives import ROWS, Index

QUERY_TILE = ROWS
"""Queries of a tile."""


MAX_HEADS_SIDE_BY_SIDE, TILES_SIDE_BY_SIDE = 16, 1024
"""Without a window the tiles of keys of several heads alternate: of at most so many query heads,
and of fewer where their tiles, counted for each query head, would be more than that. Few heads, so
that several programs read the same queries from the L2 cache; but enough that programs which start
together seldom wait for each other. On an H100, forward and backward, heads of 128: 32768 tokens
took 3% less time with 4 heads than with 16, 8192 tokens 3% less with 16 than with 8, and 2048
tokens 9% more with 64 than with 16."""


class TaskPart(NamedTuple):
    """What one program computes of a task: some heads of its group, or some of the queries.

    Attributes:
        task: number of the task.
        first_head: of the part, counted from the group's first.
        heads: how many.
        part: number of the part.
        is_last: whether it is the task's last part.
        number: number of the task among those that are split.
        parts: how many parts of the queries the task has; None: each part has all queries.
    """

    task: Index
    first_head: Index
    heads: Index | int
    part: Index
    is_last: Bool[Array, ""]
    number: Index
    parts: Index | None = None


@dataclasses.dataclass(frozen=True)
class BackwardSchedule:
    """What the schedules of all programs of a launch have in common.

    Attributes:
        num_kv_heads: heads of keys.
        group_size: query heads of each.
        batch_kv_heads: heads of keys in all rows of the batch.
        key_tile: keys of a tile.
        num_keys: all keys.
        num_key_tiles: their tiles.
        num_query_tiles: tiles of queries.
        offset: position of the first key.
        halo_key_tiles: how many of the tiles of keys are a halo's; they come before the own ones.
        packed: whether there are documents.
        window: keys before a query that it sees, or None.
        has_ends: whether some keys are behind the end of a query's sequence.
        halo_last: whether the tasks of a halo's keys come after those of the own keys of all heads.
        split_tasks: how many of the last tasks are split.
        parts: into how many parts each.
    """

    num_kv_heads: int
    group_size: int
    batch_kv_heads: int
    key_tile: int
    num_keys: int
    num_key_tiles: int
    num_query_tiles: int
    offset: int
    halo_key_tiles: int
    packed: bool
    window: int | None
    has_ends: bool = False
    halo_last: bool = False
    split_tasks: int = 0
    parts: int = 1

    @property
    def sees_all(self) -> bool:
        """Whether every query sees every key, and tiles of keys hold nothing else."""
        return self.num_keys % self.key_tile == 0 and sees_all_keys(
            self.window,
            first_query=0,
            keys_end=self.offset + self.num_keys,
            one_sequence=not self.packed and not self.has_ends,
        )

    @property
    def longest_first(self) -> bool:
        """Whether programs of the first keys, which have the most queries, start and add first."""
        return self.window is None and not self.packed

    @property
    def sees_documents(self) -> bool:
        """Whether queries see all of their documents, so that a document's keys begin alike."""
        return self.window is None and self.packed and self.has_ends

    @property
    def kv_heads_side_by_side(self) -> int | None:
        """How many heads of keys alternate; None: one head has all its programs before the next."""
        if not self.longest_first and not self.sees_documents:
            return None
        heads = min(MAX_HEADS_SIDE_BY_SIDE, TILES_SIDE_BY_SIDE // self.num_key_tiles)
        return max(1, heads // self.group_size)

    @property
    def query_tiles_per_key_tile(self) -> int:
        """Tiles of queries at the positions of one tile of own keys."""
        return self.key_tile // QUERY_TILE

    @property
    def tasks(self) -> int:
        """Tiles of keys of all heads of keys."""
        return self.batch_kv_heads * self.num_key_tiles

    @property
    def own_key_tiles(self) -> int:
        """Tiles of the shard's own keys."""
        return self.num_key_tiles - self.halo_key_tiles

    @property
    def halo_tasks(self) -> int:
        """Tiles of a halo's keys of all heads of keys."""
        return self.batch_kv_heads * self.halo_key_tiles

    @property
    def programs(self) -> int:
        """How many there are: whole tasks, the first parts of all split tasks, the second ..."""
        return self.tasks + self.split_tasks * (self.parts - 1)

    def task_part(self, index: Index) -> TaskPart:
        """What program ``index`` computes."""
        if not self.split_tasks:
            zero = jnp.int32(0)
            return TaskPart(index, zero, self.group_size, zero, jnp.bool_(True), zero)
        whole = jnp.int32(self.tasks - self.split_tasks)
        beyond = jnp.maximum(index - whole, 0)
        part, number = (f(beyond, jnp.int32(self.split_tasks)) for f in (lax.div, lax.rem))
        is_split = index >= whole
        part_size, by_queries = self.group_size // self.parts, self.sees_all
        heads = self.group_size
        return TaskPart(
            task=jnp.minimum(index, whole + number),
            first_head=jnp.int32(0) if by_queries else part * part_size,
            heads=heads if by_queries else jnp.where(is_split, part_size, heads),
            part=part,
            is_last=~is_split | (part == self.parts - 1),
            number=number,
            parts=jnp.where(is_split, self.parts, 1) if by_queries else None,
        )

    def task_coordinates(self, task: Int[Array, "*n"]) -> tuple[Int[Array, "*n"], Int[Array, "*n"]]:
        """(head of keys in the batch, tile of keys) of a task."""
        if not self.halo_last:
            sizes = self.num_key_tiles, self.batch_kv_heads, self.kv_heads_side_by_side
            head, tile = task_coordinates(task, *sizes)
            return head, self.num_key_tiles - 1 - tile if self.sees_documents else tile
        own_tasks = self.tasks - self.halo_tasks
        halo_task, tiles = jnp.maximum(task - own_tasks, 0), jnp.int32(self.halo_key_tiles)
        in_halo = lax.div(halo_task, tiles), lax.rem(halo_task, tiles)
        if not own_tasks:
            return in_halo
        own_task = jnp.minimum(task, own_tasks - 1)
        head, tile = task_coordinates(own_task, self.own_key_tiles, self.batch_kv_heads, None)
        in_own = head, tile + self.halo_key_tiles
        is_halo = task >= own_tasks
        return jnp.where(is_halo, in_halo[0], in_own[0]), jnp.where(is_halo, in_halo[1], in_own[1])


def task_coordinates(
    index: Int[Array, "*n"], num_key_tiles: int, batch_kv_heads: int, side: int | None
) -> tuple[Int[Array, "*n"], Int[Array, "*n"]]:
    """(head of keys in the batch, tile of keys) of a task.

    With ``side`` None, a head's tiles of keys from the last to the first, then the next head's.
    Else from the first to the last, those of ``side`` heads alternating.
    """
    if side is None:
        last = num_key_tiles - 1
        count = jnp.int32(num_key_tiles)
        return lax.div(index, jnp.int32(num_key_tiles)), last - lax.rem(index, count)
    before = lax.div(index, jnp.int32(num_key_tiles * side)) * side
    index = index - before * num_key_tiles
    width = jnp.minimum(batch_kv_heads - before, side)
    return before + lax.rem(index, width), lax.div(index, width)
