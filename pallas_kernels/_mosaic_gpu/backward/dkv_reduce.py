"""How programs of the fused Mosaic GPU backward kernels share a tile of keys.

Each has some heads of the group. The first one leaves its sums, the gradients of keys and values,
in global memory, in float32 and as they lie in registers; the next one adds them to its own, in a
fixed order, and so on; the last one writes them all up. With heads of 128 a tile takes 128 KiB.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward.scheduler import Path, Paths
from pallas_kernels._mosaic_gpu.primitives import ROWS, tell_and_wait, tell_of_stores

WIDEST = 128
"""Columns of a matrix at most."""


def sums(paths: Paths, dims: dict[str, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays for results of so many columns on their way."""
    if not paths.cut:
        return {}
    rows = paths.key_tile // ROWS
    return {
        f"{name}_sums": jax.ShapeDtypeStruct(
            (paths.cut, rows, -(-dim // WIDEST), *register_tiles.tile_shape(min(dim, WIDEST))),
            jnp.float32,
        )
        for name, dim in dims.items()
    }


def counters(paths: Paths) -> dict[str, tuple[int, ...]]:
    """Shapes of those that say how many parts of a task have left their sums."""
    return {"handed": (paths.cut, 2)} if paths.cut else {}


def hand_over(
    path: Path,
    refs: dict[str, Any],
    me: int | Array,
    rows: int | Array,
    results: dict[str, tuple[Array, ...]],
    write: Callable[[dict[str, tuple[Array, ...]]], None],
) -> None:
    """Adds what other parts of a task have left to a warpgroup's results; writes or leaves them.

    Args:
        path: the program's.
        refs: its arrays.
        me: the warpgroup.
        rows: which `ROWS` of the keys are its own.
        results: by name, matrices of at most `WIDEST` columns.
        write: writes results.
    """
    if not path.paths.cut:
        write(results)
        return
    share = path.share
    handed = refs["handed"].at[share.number, me]
    tell_and_wait(handed, 0, handed, share.part)

    def place(name: str, n: int, columns: int) -> Any:
        there = pl.ds(0, register_tiles.tile_shape(columns)[0])
        return refs[f"{name}_sums"].at[share.number, rows, n, there]

    def with_others(name: str, n: int, x: Array) -> Array:
        columns = x.shape[1]
        there = place(name, n, columns)
        return lax.cond(
            share.part > 0, lambda x: x + register_tiles.load(there, columns), lambda x: x, x
        )

    totals = {
        name: tuple(with_others(name, n, x) for n, x in enumerate(matrices))
        for name, matrices in results.items()
    }
    pl.when(share.is_last)(partial(write, totals))

    @pl.when(~share.is_last)
    def leave():
        for name, matrices in totals.items():
            for n, x in enumerate(matrices):
                register_tiles.store(place(name, n, x.shape[1]), x)
        tell_of_stores(handed)
