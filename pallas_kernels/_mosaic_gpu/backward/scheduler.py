"""Ways of the fused Mosaic GPU backward kernels over tiles of queries: which program is where when.

A program has one tile of keys and takes the tiles of queries that see them, of heads of the
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

A task is a tile of keys with all heads of its group. At the end of a launch, where multiprocessors
would wait for the last tasks, some of these are cut into programs of fewer heads each.
"""

import dataclasses
import functools
import heapq
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._mosaic_gpu.primitives import ROWS, fori

QUERIES = ROWS
"""Queries of a tile."""


SIDE = 16
"""Heads side by side without a window: so few that several programs share one's queries."""


MANY = 64
"""Tasks for each multiprocessor of a GPU."""


class Share(NamedTuple):
    """What a program has of a task: ``heads`` of the group's, ``first_head`` and so on.

    It is the last ``part`` of the task or not; ``number`` counts tasks that are cut.
    """

    task: Array
    first_head: Array
    heads: Array | int
    part: Array
    is_last: Array
    number: Array


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
        cut: how many of the last tasks are cut into parts.
        parts: so many, each for as many of the group's heads.
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
    cut: int = 0
    parts: int = 1

    @property
    def longest_first(self) -> bool:
        """Whether the first tiles of keys come first, and add first."""
        return self.window is None and not self.packed

    @property
    def side(self) -> int | None:
        """How many pairs are side by side; None: one comes after the other."""
        return max(1, SIDE // self.group) if self.longest_first else None

    @property
    def beside(self) -> int:
        """Tiles of queries beside one of keys."""
        return self.key_tile // QUERIES

    @property
    def tasks(self) -> int:
        """Tiles of keys of all pairs."""
        return self.pairs * self.key_tiles

    @property
    def programs(self) -> int:
        """How many there are: the tasks that are cut come last, first all of their first parts."""
        return self.tasks + self.cut * (self.parts - 1)

    def share(self, index: Array) -> "Share":
        """What a program has of a task."""
        if not self.cut:
            zero = jnp.int32(0)
            return Share(index, zero, self.group, zero, jnp.bool_(True), zero)
        whole, size = jnp.int32(self.tasks - self.cut), self.group // self.parts
        beyond = jnp.maximum(index - whole, 0)
        part, number = (f(beyond, jnp.int32(self.cut)) for f in (lax.div, lax.rem))
        is_cut = index >= whole
        return Share(
            task=jnp.minimum(index, whole + number),
            first_head=part * size,
            heads=jnp.where(is_cut, size, self.group),
            part=part,
            is_last=~is_cut | (part == self.parts - 1),
            number=number,
        )

    def steps(self, offset: int, *, nobodys_halo: bool = False) -> list[int]:
        """How many tiles of queries a head of each task sees if there are no documents.

        Tasks are in their order; ``offset`` is the position of the first key.
        """
        ends = [min((n + 1) * self.key_tile, self.keys) + offset for n in range(self.key_tiles)]
        begins = [max(n * self.key_tile + offset, 0) // QUERIES for n in range(self.key_tiles)]
        found = [
            0
            if nobodys_halo and end <= 0
            else self.blocks - begin
            if self.window is None
            else min((end - 1 + self.window) // QUERIES + 1, self.blocks) - begin
            for begin, end in zip(begins, ends, strict=True)
        ]
        if self.side is None:
            return found[::-1] * self.pairs
        sides = [self.side] * (self.pairs // self.side) + [self.pairs % self.side]
        return [steps for side in sides for steps in found for _ in range(side)]


class Path:
    """The way of one program.

    A state of it says how many of its heads, and how many tiles of queries, are behind.

    Args:
        paths: all of them.
        index: the program's number.
        plan: `pallas_kernels._band.query_plan`, after `with_own_queries`, as a ref.
        start: where the sequence of each query starts, as a ref; None if there is one sequence.
    """

    def __init__(self, paths: Paths, index: Array, plan: Any, start: Any):
        self.paths = paths
        self.share = paths.share(index)
        pair, self.tile = task(self.share.task, paths.key_tiles, paths.pairs, paths.side)
        self.row, self.kv_head = (f(pair, jnp.int32(paths.num_kv)) for f in (lax.div, lax.rem))
        row = self.row if paths.packed else 0
        self.begin, self.clear_begin, self.clear_end, self.end = (
            plan[row, self.tile, n] for n in range(4)
        )
        # Tiles of keys see consecutive tiles of queries, and begin and end in their own order.
        ended = plan[row, jnp.maximum(self.tile - 1, 0), 3]
        self.last_from = jnp.where(self.tile > 0, ended, 0)
        self.steps = (self.end - self.begin) * self.share.heads
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
            return following_down(member, n, self.share.heads)
        return following(member, n, self.share.heads, self.end - self.begin, self.near)

    def at(self, member: Array, n: Array) -> tuple[Array, Array]:
        """(head, tile of queries) of a state."""
        block = self.end - 1 - n if self.paths.longest_first else self.begin + n
        head = self.kv_head * self.paths.group + self.share.first_head + member
        return head, block

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


@functools.cache
def cut_at_the_end(paths: Paths, offset: int, processors: int) -> Paths:
    """With the last tasks cut where that takes less time; ``offset`` is that of the first key."""
    if paths.tasks > MANY * processors:  # the last ones are next to nothing of all
        return paths
    devices = [paths.steps(offset)]
    several = 0 < paths.before_own < paths.key_tiles
    if several:  # a ring's first device has a halo that is nobody's
        devices.append(paths.steps(offset, nobodys_halo=True))
    # A halo's tasks wait for those before them, of the same heads: so all of them or none.
    some = {paths.key_tiles} if several else {processors // 2, processors}
    cut, parts = cut_of_tasks(devices, paths.group, processors, some)
    return dataclasses.replace(paths, cut=cut, parts=parts)


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


def following(member, n, group, count, beside=None):
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


def following_down(member, n, group):
    """The next step of a walk over tiles of queries, at each of them through a group's heads."""
    last = member == group - 1
    return jnp.where(last, 0, member + 1), jnp.where(last, n + 1, n)


def fold(path: Path, step: Callable[..., Any], carry: Any) -> Any:
    """Folds ``step(head, block, number, carry)`` over a program's tiles of queries."""

    def visit(number, state):
        *here, carry = state
        carry = step(*path.at(*here), number, carry)
        return *path.after(*here), carry

    return fori(0, path.steps, visit, (*path.first, carry))[2]


def slot_of(number: Array, slots: int) -> Array:
    """Where the arrays of a step are, of so many places."""
    return lax.rem(number, jnp.int32(slots))


AROUND, HANDING = 3, 2
"""What it takes to begin and end a program of the fused backward kernel, and to hand its sums on to
another one, in tiles of queries: 7 and about 4 microseconds on an H100, where a tile takes 2.2.
Measured with heads of 128, and taken for wider ones too."""


PARTS = 8
"""Parts of a task at most."""


def cut_of_tasks(
    devices: list[list[int]], group: int, processors: int, some: set[int]
) -> tuple[int, int]:
    """How many of the last tasks of the fused backward kernel to cut, and into how many parts.

    A part has as many of a group's heads as another one. ``devices`` say how many tiles of queries
    a head has in each task, as if there were no documents; ``some`` or all tasks may be cut.
    Cutting must take a hundredth off the time, as a mean of the devices.
    """
    count = len(devices[0])

    def time(tiles, cut, parts):
        """When the last program ends: processors take the next one as soon as they have none."""
        whole = [n * group + AROUND for n in tiles[: count - cut]]
        parted = [n * group // parts + AROUND + HANDING for n in tiles[count - cut :]]
        free = [0] * processors
        for program in (*whole, *parted * parts):
            heapq.heapreplace(free, free[0] + program)
        return max(free)

    def mean(cut, parts):
        return sum(time(tiles, cut, parts) for tiles in devices) / len(devices)

    best, least = (0, 1), 0.99 * mean(0, 1)
    for cut in sorted({n for n in some if n < count} | {count}):
        for parts in (n for n in range(2, PARTS + 1) if group % n == 0):
            if (found := mean(cut, parts)) < least:
                best, least = (cut, parts), found
    return best
