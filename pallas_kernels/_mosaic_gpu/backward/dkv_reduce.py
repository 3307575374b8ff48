"""How the programs that split a task of a fused Mosaic GPU backward kernel add up dk and dv.

Each program has some heads of the group, so each has a sum over its own heads. The first part
stores its sums in global memory, in float32 and in the order of `register_tiles`. The next part
adds these to its own and stores the result, and so on, in a fixed order; the last part writes dk
and dv. With heads of 128 the sums of a tile of 128 keys take 128 KiB.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float32

from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward.scheduler import ProgramSchedule
from pallas_kernels._mosaic_gpu.backward.tasks import BackwardSchedule
from pallas_kernels._mosaic_gpu.primitives import (
    ROWS,
    Index,
    semaphore_signal_after_stores,
    semaphore_signal_and_wait,
)

MAX_COLUMNS = 128
"""Columns of a matrix of sums at most."""


def partial_sum_types(
    schedule: BackwardSchedule, dims: dict[str, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays for the sums of all split tasks, for results of so many columns."""
    if not schedule.split_tasks:
        return {}
    row_tiles = schedule.key_tile // ROWS
    return {
        f"{name}_sums": jax.ShapeDtypeStruct(
            (
                schedule.split_tasks,
                row_tiles,
                pl.cdiv(dim, MAX_COLUMNS),
                *register_tiles.tile_shape(min(dim, MAX_COLUMNS)),
            ),
            jnp.float32,
        )
        for name, dim in dims.items()
    }


def semaphore_shapes(schedule: BackwardSchedule) -> dict[str, tuple[int, ...]]:
    """For each split task and warpgroup, how many parts have stored their sums."""
    return {"stored_parts": (schedule.split_tasks, 2)} if schedule.split_tasks else {}


def reduce_parts_in_order(
    program: ProgramSchedule,
    refs: dict[str, Any],
    warpgroup: int | Index,
    row_tile: int | Index,
    results: Mapping[str, tuple[Float32[Array, "64 _"], ...]],
    write: Callable[[Mapping[str, tuple[Array, ...]]], None],
) -> None:
    """Adds the sums of a task's earlier parts to a warpgroup's own; stores or writes the result.

    Args:
        program: the schedule of the program.
        refs: its arrays.
        warpgroup: number of the warpgroup.
        row_tile: which `ROWS` of the tile of keys the results are of.
        results: the warpgroup's own sums, by name, in matrices of at most `MAX_COLUMNS` columns.
        write: writes what has been added up to dk and dv.
    """
    if not program.launch.split_tasks:
        write(results)
        return
    part = program.part
    stored_parts = refs["stored_parts"].at[part.number, warpgroup]
    # Waits until this warpgroup of each earlier part has stored its sums.
    semaphore_signal_and_wait(stored_parts, 0, stored_parts, part.part)

    def slot(name: str, n: int, columns: int) -> Any:
        memory_rows = pl.ds(0, register_tiles.tile_shape(columns)[0])
        return refs[f"{name}_sums"].at[part.number, row_tile, n, memory_rows]

    def with_earlier_parts(name: str, n: int, x: Array) -> Array:
        columns = x.shape[1]
        src = slot(name, n, columns)
        return lax.cond(
            part.part > 0, lambda x: x + register_tiles.load(src, columns), lambda x: x, x
        )

    sums = {
        name: tuple(with_earlier_parts(name, n, x) for n, x in enumerate(matrices))
        for name, matrices in results.items()
    }
    pl.when(part.is_last)(partial(write, sums))

    @pl.when(~part.is_last)
    def store():
        for name, matrices in sums.items():
            for n, x in enumerate(matrices):
                register_tiles.store(slot(name, n, x.shape[1]), x)
        semaphore_signal_after_stores(stored_parts)
