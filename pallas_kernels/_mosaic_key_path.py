"""Ways of the fused Mosaic GPU backward kernels over tiles of queries: which program is where when.

A program has one tile of keys and takes the tiles of queries that see them, of all heads of the
group. Gradients of queries are added in a fixed order, as a rule from the last keys to the first,
so that results repeat their bits. Each tile of keys begins with its own queries and goes on to
later ones, so that tiles of keys at work side by side are at different queries, reach a tile of
queries one after the other, in that order, and hardly wait; head by head, so that what they read
and add stays in the L2 cache. Programs take tiles of keys from the last to the first too: they
start in the order of their numbers, so that what one waits for is under way.

Without a window and documents the first keys have the most queries. So they come first, several
heads side by side, which leaves no multiprocessor idle at the end; and all walk down from the last
queries, at each of them through all heads of the group, so that programs that have started together
are at the same queries.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._mosaic_blocks import ROWS

QUERIES = ROWS
"""Queries of a tile."""
SIDE = 16
"""Heads side by side without a window: so few that several programs share one's queries."""


@dataclasses.dataclass(frozen=True)
class Paths:
    """What the ways of all programs of a launch have in common.

    Attributes:
        num_kv: heads of keys.
        group: query heads of each.
        pairs: of a row of the batch and a head of keys.
        key_tile: keys of a program.
        keys: all of them.
        key_tiles: their tiles.
        blocks: tiles of queries.
        before_own: tiles of keys of a halo, before those of keys beside the queries.
        packed: whether there are documents.
        window: keys before a query that it sees, or None.
    """

    num_kv: int
    group: int
    pairs: int
    key_tile: int
    keys: int
    key_tiles: int
    blocks: int
    before_own: int
    packed: bool
    window: int | None

    @property
    def longest_first(self) -> bool:
        """Whether the first tiles of keys come first, and add first.

        Not if a halo comes with own keys: on a ring's first device it is nobody's, so that nobody
        would add first.
        """
        alone = self.before_own in (0, self.key_tiles)
        return self.window is None and not self.packed and alone

    @property
    def beside(self) -> int:
        """Tiles of queries beside one of keys."""
        return self.key_tile // QUERIES

    def place(self, index: Array) -> tuple[Array, Array, Array]:
        """(row, key/value head, tile of keys) of a program."""
        side = max(1, SIDE // self.group) if self.longest_first else None
        pair, tile = task(index, self.key_tiles, self.pairs, side)
        return lax.div(pair, jnp.int32(self.num_kv)), lax.rem(pair, jnp.int32(self.num_kv)), tile


class Path:
    """The way of one program.

    A state of it says how many heads of the group, and how many tiles of queries, are behind.

    Args:
        paths: all of them.
        index: the program's number.
        plan: `pallas_kernels._band.query_plan`, after `with_own_queries`, as a ref.
        start: where the sequence of each query starts, as a ref; None if there is one sequence.
    """

    def __init__(self, paths: Paths, index: Array, plan: Any, start: Any):
        self.paths = paths
        self.row, self.kv_head, self.tile = paths.place(index)
        row = self.row if paths.packed else 0
        self.begin, self.clear_begin, self.clear_end, self.end = (
            plan[row, self.tile, n] for n in range(4)
        )
        # Tiles of keys see consecutive tiles of queries, and begin and end in their own order.
        ended = plan[row, jnp.maximum(self.tile - 1, 0), 3]
        self.last_from = jnp.where(self.tile > 0, ended, 0)
        self.steps = (self.end - self.begin) * paths.group
        self.near = None
        if paths.packed and paths.before_own < paths.key_tiles:
            own_tile = self.tile - paths.before_own
            own_keys = paths.keys - paths.before_own * paths.key_tile
            last_key = jnp.minimum((own_tile + 1) * paths.key_tile, own_keys) - 1
            several = start[row, jnp.maximum(last_key, 0)] > own_tile * paths.key_tile
            self.near = jnp.where((own_tile >= 0) & several, paths.beside, 0)

    @property
    def first(self) -> tuple[Array, Array]:
        """The first state."""
        return jnp.int32(0), jnp.int32(0)

    def after(self, member: Array, n: Array) -> tuple[Array, Array]:
        """The next state."""
        if self.paths.longest_first:
            return following_down(member, n, self.paths.group)
        return following(member, n, self.paths.group, self.end - self.begin, self.near)

    def at(self, member: Array, n: Array) -> tuple[Array, Array]:
        """(head, tile of queries) of a state."""
        block = self.end - 1 - n if self.paths.longest_first else self.begin + n
        return self.kv_head * self.paths.group + member, block

    def is_clear(self, block: Array) -> Array:
        """Whether all queries of a tile see all keys of the program."""
        return (block >= self.clear_begin) & (block < self.clear_end)

    def before(self, block: Array) -> Array:
        """How many programs add to a tile of queries before this one."""
        if self.paths.longest_first:
            return self.tile
        # The last keys that a tile of queries sees are beside it; all of a halo's are before it.
        own = self.paths.before_own + lax.div(block, jnp.int32(self.paths.beside))
        return jnp.minimum(own, self.paths.key_tiles - 1) - self.tile

    def is_last(self, block: Array) -> Array:
        """Whether no program adds to a tile of queries after this one; if not longest first."""
        return block >= self.last_from


def with_own_queries(plan: Array, paths: Paths) -> Array:
    """The `query_plan`, [..., tiles of keys, 4], but that all own keys see the queries beside them.

    So each tile of queries is seen, also one of padding, which has no gradient.
    """
    number = jnp.arange(1, paths.key_tiles + 1, dtype=jnp.int32) - paths.before_own
    return plan.at[..., 3].max(jnp.minimum(number * paths.beside, paths.blocks))


def task(index, key_tiles: int, pairs: int, side: int | None):
    """(which of the pairs of a row and a head, which of its tiles of keys) a program has.

    The last tiles of a pair first; or the first ones of so many pairs ``side`` by side.
    """
    if side is None:
        last = key_tiles - 1
        return lax.div(index, jnp.int32(key_tiles)), last - lax.rem(index, jnp.int32(key_tiles))
    before = lax.div(index, jnp.int32(key_tiles * side)) * side
    index = index - before * key_tiles
    width = jnp.minimum(pairs - before, side)
    return before + lax.rem(index, width), lax.div(index, width)


def following(member, n, group: int, count, beside=None):
    """The next step of a walk over ``count`` tiles of queries of a group's heads, head by head.

    But if so many tiles ``beside`` the tile of keys are given, they come first, for all heads. That
    is for keys of several documents: tiles of keys of the first one would else wait for this walk
    at the end of each of their heads.
    """
    last = n == count - 1
    if beside is None:
        return jnp.where(last, member + 1, member), jnp.where(last, 0, n + 1)
    near = n < beside
    last = jnp.where(near, member == group - 1, last)
    next_head = near != last
    next_member = jnp.where(next_head, member + 1, jnp.where(near, 0, member))
    return next_member, jnp.where(next_head, jnp.where(near, n, beside), n + 1)


def following_down(member, n, group: int):
    """The next step of a walk over tiles of queries, at each of them through a group's heads."""
    last = member == group - 1
    return jnp.where(last, 0, member + 1), jnp.where(last, n + 1, n)
