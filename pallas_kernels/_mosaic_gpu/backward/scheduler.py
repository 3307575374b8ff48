"""Which program of a fused Mosaic GPU backward kernel computes what, and in which order.

A program has one tile of keys, and the queries of all heads of its group that see these keys. Its
steps are pairs of a query head and a tile of queries. Names: ``key_block`` and ``query_block`` are
the numbers of a tile of keys and of a tile of queries (FlashAttention's n_block and m_block); a
*group* is the query heads that share a head of keys; *own* keys are the shard's, as opposed to a
halo's.

Several programs add to the gradients of a query, in a fixed order, so that results repeat their
bits. The order of programs and of their steps is chosen so that they rarely wait for each other:

- As a rule the program with the last keys adds first. A program starts at the query tile on its
  diagonal and moves to later ones. Concurrent programs therefore come to a query tile one by one,
  in the order in which they must add. They go through one head after the other, so that what they
  read and add stays in the L2 cache.
- Without a window and documents the first keys have the most queries. Their programs come first, of
  several heads at once, so that no long program is left for the end. All go from the last queries
  to the first, and through all heads of the group at each tile, so that programs that started
  together are at the same queries.
- Where queries see all of their documents, all programs of a document begin at its first query. So
  those of several heads are at work at once, and few of each.

A program waits only for programs with lower indices, which the GPU has started before it.

A *task* is a tile of keys with all heads of its group. At the end of a launch some multiprocessors
would be idle while the last tasks run. So some tasks are split into parts of fewer heads, each of
which is a program; or into parts of fewer queries, where all queries see all keys.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from pallas_kernels._mosaic_gpu.primitives import ROWS, fori

QUERY_TILE = ROWS
"""Queries of a tile."""


HEADS_SIDE_BY_SIDE = 16
"""Query heads whose tiles of keys alternate without a window: few, so that several programs read
the same queries from the L2 cache."""


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

    task: Int[Array, ""]
    first_head: Int[Array, ""]
    heads: Int[Array, ""] | int
    part: Int[Array, ""]
    is_last: Bool[Array, ""]
    number: Int[Array, ""]
    parts: Int[Array, ""] | None = None


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
        whole_tiles = self.num_keys % self.key_tile == 0
        only_before = self.window is None and self.offset + self.num_keys <= 1
        return only_before and whole_tiles and not self.packed and not self.has_ends

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
        side_by_side = self.longest_first or self.sees_documents
        return max(1, HEADS_SIDE_BY_SIDE // self.group_size) if side_by_side else None

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

    def task_part(self, index: Int[Array, ""]) -> TaskPart:
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

    def steps_per_head(self, *, halo_is_seen: bool = True) -> list[int]:
        """How many tiles of queries see each task's keys if there are no documents.

        Args:
            halo_is_seen: False for a ring's first device, whose halo belongs to no sequence.

        Returns:
            A number for each task, in their order.
        """
        tiles, offset = range(self.num_key_tiles), self.offset
        ends = [min((n + 1) * self.key_tile, self.num_keys) + offset for n in tiles]
        begins = [max(n * self.key_tile + offset, 0) // QUERY_TILE for n in tiles]
        steps = [
            0
            if end <= 0 and not halo_is_seen
            else self.num_query_tiles - begin
            if self.window is None
            else max(
                min((end - 1 + self.window) // QUERY_TILE + 1, self.num_query_tiles) - begin, 0
            )
            for begin, end in zip(begins, ends, strict=True)
        ]
        side = self.kv_heads_side_by_side
        if self.halo_last:
            halo, own = steps[: self.halo_key_tiles], steps[self.halo_key_tiles :]
            return own[::-1] * self.batch_kv_heads + halo * self.batch_kv_heads
        if side is None:
            return steps[::-1] * self.batch_kv_heads
        sides = [side] * (self.batch_kv_heads // side) + [self.batch_kv_heads % side]
        steps = steps[::-1] if self.sees_documents else steps
        return [n for side in sides for n in steps for _ in range(side)]


def halo_is_better_last(schedule: BackwardSchedule, num_sms: int) -> bool:
    """Whether a launch takes less time where the tasks of a halo's keys come last.

    On an H100 80GB with 32/4 heads of 128, forward and backward: 9% less with 8192 tokens and a
    window of 4000, 11% with a window of 8000, 13% with 12288 tokens and a window of 12000, 3% with
    16384 and 8000; but 2% more with 8192 and 2000. More own tiles than multiprocessors occupy all
    of these at first, so that the halo's programs start one by one anyway.
    """
    own, halo = schedule.own_key_tiles, schedule.halo_key_tiles
    if schedule.packed or schedule.window is None or not halo:
        return False
    return 2 * halo >= own and own < num_sms


class ProgramSchedule:
    """The steps of one program.

    The state of a schedule, ``(member, n)``, says at which of the program's heads and at which of
    its tiles of queries it is, both counted from 0.

    Args:
        launch: what all programs have in common.
        index: the program's.
        plan: `pallas_kernels._tile_ranges.query_plan`, after `plan_with_diagonal` or
            `plan_in_order`, and where the halo is last after `plan_with_first_block`, as a ref.
        start: where the sequence of each query starts, as a ref; None if there is one sequence.
        last_block: `last_key_blocks` as a ref; None where documents have no ends.
    """

    def __init__(
        self,
        launch: BackwardSchedule,
        index: Int[Array, ""],
        plan: Any,
        start: Any,
        last_block: Any = None,
    ):
        self.launch = launch
        self.part = launch.task_part(index)
        batch_kv_head, self.key_block = launch.task_coordinates(self.part.task)
        num_kv_heads = jnp.int32(launch.num_kv_heads)
        self.row, self.kv_head = (f(batch_kv_head, num_kv_heads) for f in (lax.div, lax.rem))
        row = self.row if launch.packed else 0
        self.begin, self.unmasked_begin, self.unmasked_end, self.end = (
            plan[row, self.key_block, n] for n in range(4)
        )
        # The query tiles of consecutive tiles of keys begin and end in the same order. So this
        # program adds last to those that the tile of keys before it does not add to.
        end_before = plan[row, jnp.maximum(self.key_block - 1, 0), 3]
        self.adds_last_from = jnp.where(self.key_block > 0, end_before, 0)
        if self.part.parts is not None:
            first, tiles, part = self.begin, self.end - self.begin, self.part.part
            self.begin = first + lax.div(tiles * part, self.part.parts)
            self.end = first + lax.div(tiles * (part + 1), self.part.parts)
        self.steps = (self.end - self.begin) * self.part.heads
        self.last_block = last_block
        # Whether the keys are a halo's that comes last, and the first tile of keys that any query
        # sees.
        self.in_last_halo = self.key_block < launch.halo_key_tiles if launch.halo_last else None
        self.first_block = plan[row, self.key_block, 4] if launch.halo_last else None
        self.diagonal_tiles = None
        if launch.packed and not launch.has_ends and launch.halo_key_tiles < launch.num_key_tiles:
            self.diagonal_tiles = self._diagonal_tiles(start, row)

    def _diagonal_tiles(self, start: Any, row: int | Int[Array, ""]) -> Int[Array, ""]:
        """Query tiles to begin with, for all heads: those on the diagonal, or 0.

        They come first where the keys are of several documents: programs of the first of these
        documents would else wait for this one until the end of each of its heads.
        """
        launch = self.launch
        own_block = self.key_block - launch.halo_key_tiles
        own_keys = launch.num_keys - launch.halo_key_tiles * launch.key_tile
        last_key = jnp.minimum((own_block + 1) * launch.key_tile, own_keys) - 1
        several = start[row, jnp.maximum(last_key, 0)] > own_block * launch.key_tile
        return jnp.where((own_block >= 0) & several, launch.query_tiles_per_key_tile, 0)

    @property
    def first_state(self) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The state of the first step."""
        return jnp.int32(0), jnp.int32(0)

    def next_state(
        self, member: Int[Array, ""], n: Int[Array, ""]
    ) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """The state of the step after this one."""
        if self.launch.longest_first:
            return next_state_heads_first(member, n, self.part.heads)
        tiles = self.end - self.begin
        return next_state_tiles_first(member, n, self.part.heads, tiles, self.diagonal_tiles)

    def coordinates(
        self, member: Int[Array, ""], n: Int[Array, ""]
    ) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """(query head, tile of queries) of a state."""
        query_block = self.end - 1 - n if self.launch.longest_first else self.begin + n
        if self.in_last_halo is not None:
            query_block = jnp.where(self.in_last_halo, self.end - 1 - n, query_block)
        head = self.kv_head * self.launch.group_size + self.part.first_head + member
        return head, query_block

    def is_unmasked(self, query_block: Int[Array, ""]) -> Bool[Array, ""] | None:
        """Whether all queries of a tile see all keys of the program, so that no mask is needed.

        None: no tile of the launch needs one.
        """
        if self.launch.sees_all:
            return None
        return (query_block >= self.unmasked_begin) & (query_block < self.unmasked_end)

    def adders_before(self, query_block: Int[Array, ""]) -> Int[Array, ""]:
        """How many programs add to a tile of queries before this one."""
        launch = self.launch
        if launch.longest_first:
            return self.key_block
        if self.last_block is not None:
            return self.last_block[self.row, query_block] - self.key_block
        # The last keys that a tile of queries sees are at its own positions, or the last of all.
        last_position = query_block * QUERY_TILE + (QUERY_TILE - 1 - launch.offset)
        last_block = lax.div(last_position, jnp.int32(launch.key_tile))
        last_block = jnp.minimum(last_block, launch.num_key_tiles - 1)
        if self.in_last_halo is None:
            return last_block - self.key_block
        # All own tiles up to the last one, and the tiles of the halo before this one.
        own = last_block - launch.halo_key_tiles + 1
        before = self.key_block - self._first_block_seen(query_block)
        return jnp.where(self.in_last_halo, own + before, last_block - self.key_block)

    def _first_block_seen(self, query_block: Int[Array, ""]) -> Int[Array, ""]:
        """The first tile of keys that a tile of queries sees."""
        launch = self.launch
        assert launch.window is not None and self.first_block is not None
        first_key = query_block * QUERY_TILE - (launch.window + launch.offset)
        block = lax.div(jnp.maximum(first_key, 0), jnp.int32(launch.key_tile))
        return jnp.maximum(block, self.first_block)

    def adds_last(self, query_block: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether no program adds to a tile of queries after this one.

        Not where ``longest_first`` or ``halo_last``.
        """
        return query_block >= self.adds_last_from


def plan_with_diagonal(
    plan: Int[Array, "B tiles 4"], schedule: BackwardSchedule
) -> Int[Array, "B tiles 4"]:
    """The `query_plan` in which all own keys see the queries at their own positions.

    So each tile of queries has a program that writes its gradient, also a tile of padding.
    """
    number = jnp.arange(1, schedule.num_key_tiles + 1, dtype=jnp.int32)
    diagonal_end = (number * schedule.key_tile + schedule.offset) // QUERY_TILE
    return plan.at[..., 3].max(jnp.minimum(diagonal_end, schedule.num_query_tiles))


def plan_in_order(plan: Int[Array, "B tiles 4"]) -> Int[Array, "B tiles 4"]:
    """The `query_plan`, where documents have ends, in which no tile of keys ends before another.

    They begin in their order anyway. So the programs that add to a tile of queries are consecutive.
    """
    return plan.at[..., 3].set(lax.cummax(plan[..., 3], axis=plan.ndim - 2))


def last_key_blocks(
    plan: Int[Array, "B tiles 4"], schedule: BackwardSchedule
) -> Int[Array, "B query_tiles"]:
    """The last tile of keys whose program adds to each tile of queries: it adds first."""
    block = jnp.arange(schedule.num_query_tiles, dtype=jnp.int32)[:, None]
    return (plan[:, None, :, 0] <= block).sum(-1, dtype=jnp.int32) - 1


def plan_with_first_block(plan: Int[Array, "B tiles 4"]) -> Int[Array, "B tiles 5"]:
    """A `query_plan` without documents, and in each row the first tile of keys that is seen.

    All tiles behind that one are seen too.
    """
    first = (plan[..., 3] <= plan[..., 0]).sum(1, dtype=jnp.int32)
    first = jnp.broadcast_to(first[:, None, None], (*plan.shape[:2], 1))
    return jnp.concatenate((plan, first), axis=-1)


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


def next_state_tiles_first(
    member: Int[Array, ""],
    n: Int[Array, ""],
    heads: int | Int[Array, ""],
    tiles: int | Int[Array, ""],
    diagonal_tiles: int | Int[Array, ""] | None = None,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The next state of a schedule that takes one head after the other.

    Args:
        member: which of the heads.
        n: which of the tiles of queries.
        heads: how many heads there are.
        tiles: how many tiles of queries.
        diagonal_tiles: how many of these come first, each for all heads; or None.
    """
    last = n == tiles - 1
    if diagonal_tiles is None:
        return jnp.where(last, member + 1, member), jnp.where(last, 0, n + 1)
    on_diagonal = n < diagonal_tiles
    last = jnp.where(on_diagonal, member == heads - 1, last)
    # On the diagonal the last head leads to the next tile; beyond it the last tile to the next
    # head.
    next_head = on_diagonal != last
    next_member = jnp.where(next_head, member + 1, jnp.where(on_diagonal, 0, member))
    return next_member, jnp.where(next_head, jnp.where(on_diagonal, n, diagonal_tiles), n + 1)


def next_state_heads_first(
    member: Int[Array, ""], n: Int[Array, ""], heads: int | Int[Array, ""]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The next state of a schedule that takes all heads at each tile of queries."""
    last = member == heads - 1
    return jnp.where(last, 0, member + 1), jnp.where(last, n + 1, n)


def fold_steps(schedule: ProgramSchedule, step: Callable[..., Any], carry: Any) -> Any:
    """Folds ``step(head, query_block, number, carry)`` over a program's steps."""

    def visit(number, state):
        *position, carry = state
        carry = step(*schedule.coordinates(*position), number, carry)
        return *schedule.next_state(*position), carry

    return fori(0, schedule.steps, visit, (*schedule.first_state, carry))[2]


def slot_of(number: Int[Array, ""], slots: int) -> Int[Array, ""]:
    """Which of so many buffers in shared memory a step uses."""
    return lax.rem(number, jnp.int32(slots))
