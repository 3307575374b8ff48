"""How programs of the fused Mosaic GPU backward kernels add up gradients of queries.

A warpgroup adds what its program has computed to what programs of other tiles of keys have added,
in float32 in global memory, through TMA.

The additions come in a fixed order, so that results repeat their bits: a counter of each tile of
queries says how many have added. On request their order is free, but that one stores before others
add; the counter says whether it has.

In a fixed order a program knows whether it is the last to come to a tile of queries. It may then
round what has been added up, so that nobody need read it again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._mosaic_gpu.backward.dq_postprocess import Rounding
from pallas_kernels._mosaic_gpu.backward.pipeline import KeyWalk
from pallas_kernels._mosaic_gpu.backward.scheduler import Path, fold, slot_of
from pallas_kernels._mosaic_gpu.primitives import fori, tell_and_wait

PLACES = 2
"""Of `add_tiles`."""


def add_parts(
    walk: KeyWalk,
    refs: dict[str, Any],
    places: Any,
    barriers: dict[str, Any],
    units: Callable[[Array], list[tuple[Any, Any]]],
):
    """Adds what each step leaves in parts, one behind the other, in ``places`` of shared memory.

    ``units`` says in which places a step leaves which parts.
    """
    path = walk.path(refs)
    counter = refs["counter"].at[path.row]
    # At first all shared memory is free.
    for place in range(places.shape[0]):
        plgpu.barrier_arrive(barriers["dquery_free"].at[place])

    def step(head, block, number, previous):
        before = before_adding(walk, path, block)
        *there, tells = previous
        tell_and_wait(counter.at[*there], tells, counter.at[head, block], before)

        def free(place, behind):
            """Tells that all parts but those of so many copies behind are out of there."""
            plgpu.wait_smem_to_gmem(behind, wait_read_only=True)
            plgpu.barrier_arrive(barriers["dquery_free"].at[place])

        sent = None
        for place, part in units(number):
            plgpu.barrier_wait(barriers["dquery"].at[place])
            send(places.at[place], refs["dquery"].at[path.row, head, block, part], before)
            plgpu.commit_smem_to_gmem_group()
            if sent is not None:
                free(sent, 1)
            sent = place
        free(sent, 0)
        return head, block, tells_others(walk, before)

    *there, tells = fold(path, step, (jnp.int32(0),) * 3)
    tell_at_the_end(counter.at[*there], tells)


def add_tiles(
    walk: KeyWalk, refs: dict[str, Any], places: Any, rounded: Any, barriers: dict[str, Any]
):
    """Adds what each step leaves as a whole in one of `PLACES` ``places`` of shared memory.

    With a `Rounding`, the last program to come to a tile of queries finds the total in its place,
    and leaves the result in what is ``rounded`` of it. Others hear of a step behind the next one,
    when it is over as a rule.
    """
    rounding, path = walk.rounding, walk.path(refs)
    counter, zero = refs["counter"].at[path.row], jnp.int32(0)

    def needs_total(number, block):
        return (number < path.steps) & path.is_last(block) & (path.before(block) > 0)

    def lend(number, block):
        """Lets a step have its place, if it needs no total."""
        free = barriers["dquery_free"].at[slot_of(number, PLACES)]
        if rounding is None:
            plgpu.barrier_arrive(free)
        else:
            pl.when(~needs_total(number, block))(lambda: plgpu.barrier_arrive(free))

    def lend_with_total(number, head, block):
        """Lets a step have its place, if it needs the total: once that is there."""
        if rounding is None:
            return

        @pl.when(needs_total(number, block))
        def fill():
            slot = slot_of(number, PLACES)
            total = refs["dquery"].at[path.row, head, block]
            plgpu.copy_gmem_to_smem(total, places.at[slot], barriers["dquery_free"].at[slot])

    def take_turn(number, head, block, told, tells):
        """Tells of the step before the last one, and waits until a step may add."""
        exists = number < path.steps
        head, block = jnp.where(exists, head, 0), jnp.where(exists, block, 0)
        wanted = jnp.where(exists, before_adding(walk, path, block), 0)
        tell_and_wait(counter.at[*told], tells, counter.at[head, block], wanted, behind=1)

    first, second = path.first, path.after(*path.first)
    lend(zero, path.at(*first)[1])
    lend(zero + 1, path.at(*second)[1])
    take_turn(zero, *path.at(*first), (zero, zero), zero)
    lend_with_total(zero, *path.at(*first))

    def step(number, state):
        member, n, *told, tells = state
        head, block = path.at(member, n)
        before, slot = before_adding(walk, path, block), slot_of(number, PLACES)
        plgpu.barrier_wait(barriers["dquery"].at[slot])

        def add():
            send(places.at[slot], refs["dquery"].at[path.row, head, block], before)

        def store(rounding: Rounding):
            for part in range(rounding.parts):
                there = rounding.there(refs, path.row, block, head, part)
                plgpu.copy_smem_to_gmem(rounded.at[slot, part, 0], there, commit_group=False)

        if rounding is None:
            add()
        else:
            pl.when(path.is_last(block))(partial(store, rounding))
            pl.when(~path.is_last(block))(add)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        following = path.after(member, n)
        lend(number + 2, path.at(*path.after(*following))[1])
        take_turn(number + 1, *path.at(*following), told, tells)
        lend_with_total(number + 1, *path.at(*following))
        return *following, head, block, tells_others(walk, before)

    *_, head, block, tells = fori(0, path.steps, step, (*path.first, zero, zero, zero))
    tell_at_the_end(counter.at[head, block], tells)


def before_adding(walk: KeyWalk, path: Path, block: Array) -> Array:
    """What the counter of a tile of queries must have reached before a program adds."""
    number = path.before(block)
    return number if walk.ordered else jnp.minimum(number, 1)


def tells_others(walk: KeyWalk, before: Array) -> Array:
    """Whether others wait for what a program adds behind so many."""
    return jnp.int32(1 if walk.ordered else before == 0)


def send(source: Any, there: Any, before: Array):
    """Adds to global memory, or stores there if there is nothing before."""

    def copy(reduction):
        plgpu.copy_smem_to_gmem(source, there, commit_group=False, reduction_op=reduction)

    pl.when(before == 0)(partial(copy, None))
    pl.when(before > 0)(partial(copy, "add"))


def tell_at_the_end(counter: Any, tells: Array):
    """Tells of the last step, once all is written."""
    tell_and_wait(counter, tells, counter, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
