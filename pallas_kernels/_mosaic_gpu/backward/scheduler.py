"""The steps of one program of a fused Mosaic GPU backward kernel.

A program has one tile of keys, and the queries of all heads of its group that see these keys, or of
some of these heads. Its steps are pairs of a query head and a tile of queries. `tasks` says which
programs there are, and why in this order.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool

from pallas_kernels._mosaic_gpu.backward.query_plans import FIRST_BLOCK
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE, BackwardSchedule
from pallas_kernels._mosaic_gpu.primitives import Index, fori
from pallas_kernels._tile_ranges import QueryColumns


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
        index: Index,
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
            plan[row, self.key_block, n] for n in QueryColumns.ALL
        )
        # The query tiles of consecutive tiles of keys begin and end in the same order. So this
        # program adds last to those that the tile of keys before it does not add to.
        end_before = plan[row, jnp.maximum(self.key_block - 1, 0), QueryColumns.END]
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
        self.first_block = plan[row, self.key_block, FIRST_BLOCK] if launch.halo_last else None
        self.diagonal_tiles = None
        if launch.packed and not launch.has_ends and launch.halo_key_tiles < launch.num_key_tiles:
            self.diagonal_tiles = self._diagonal_tiles(start, row)

    def _diagonal_tiles(self, start: Any, row: int | Index) -> Index:
        """Query tiles to begin with, for all heads: those on the diagonal, or 0.

        They come first where the keys are of several documents. The first of these documents has no
        queries beyond the diagonal. So programs of its earlier keys would else wait, head by head,
        while this one goes through the queries of the last document.
        """
        launch = self.launch
        own_block = self.key_block - launch.halo_key_tiles
        own_keys = launch.num_keys - launch.halo_key_tiles * launch.key_tile
        last_key = jnp.minimum((own_block + 1) * launch.key_tile, own_keys) - 1
        several = start[row, jnp.maximum(last_key, 0)] > own_block * launch.key_tile
        return jnp.where((own_block >= 0) & several, launch.query_tiles_per_key_tile, 0)

    @property
    def first_state(self) -> tuple[Index, Index]:
        """The state of the first step."""
        return jnp.int32(0), jnp.int32(0)

    def next_state(self, member: Index, n: Index) -> tuple[Index, Index]:
        """The state of the step after this one."""
        if self.launch.longest_first:
            return next_state_heads_first(member, n, self.part.heads)
        tiles = self.end - self.begin
        return next_state_tiles_first(member, n, self.part.heads, tiles, self.diagonal_tiles)

    def coordinates(self, member: Index, n: Index) -> tuple[Index, Index]:
        """(query head, tile of queries) of a state."""
        query_block = self.end - 1 - n if self.launch.longest_first else self.begin + n
        if self.in_last_halo is not None:
            query_block = jnp.where(self.in_last_halo, self.end - 1 - n, query_block)
        head = self.kv_head * self.launch.group_size + self.part.first_head + member
        return head, query_block

    def is_unmasked(self, query_block: Index) -> Bool[Array, ""] | None:
        """Whether all queries of a tile see all keys of the program, so that no mask is needed.

        None: no tile of the launch needs one.
        """
        if self.launch.sees_all:
            return None
        return (query_block >= self.unmasked_begin) & (query_block < self.unmasked_end)

    def adders_before(self, query_block: Index) -> Index:
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

    def _first_block_seen(self, query_block: Index) -> Index:
        """The first tile of keys that a tile of queries sees."""
        launch = self.launch
        assert launch.window is not None and self.first_block is not None
        first_key = query_block * QUERY_TILE - (launch.window + launch.offset)
        block = lax.div(jnp.maximum(first_key, 0), jnp.int32(launch.key_tile))
        return jnp.maximum(block, self.first_block)

    def adds_last(self, query_block: Index) -> Bool[Array, ""]:
        """Whether no program adds to a tile of queries after this one.

        Not where ``longest_first`` or ``halo_last``.
        """
        return query_block >= self.adds_last_from


def next_state_tiles_first(
    member: Index,
    n: Index,
    heads: int | Index,
    tiles: int | Index,
    diagonal_tiles: int | Index | None = None,
) -> tuple[Index, Index]:
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


def next_state_heads_first(member: Index, n: Index, heads: int | Index) -> tuple[Index, Index]:
    """The next state of a schedule that takes all heads at each tile of queries."""
    last = member == heads - 1
    return jnp.where(last, 0, member + 1), jnp.where(last, n + 1, n)


def fold_steps(program: ProgramSchedule, step: Callable[..., Any], carry: Any) -> Any:
    """Folds ``step(head, query_block, number, carry)`` over a program's steps."""

    def visit(number, state):
        *position, carry = state
        carry = step(*program.coordinates(*position), number, carry)
        return *program.next_state(*position), carry

    return fori(0, program.steps, visit, (*program.first_state, carry))[2]


def slot_of(number: Index, slots: int) -> Index:
    """Which of so many buffers in shared memory a step uses."""
    return lax.rem(number, jnp.int32(slots))
