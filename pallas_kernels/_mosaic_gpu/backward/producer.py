"""The producer of the fused Mosaic GPU backward kernels: the warpgroup that copies through TMA.

It copies a program's keys and values once. Then, step by step, it copies what belongs to a tile of
queries, as far ahead of the consumers as there are free slots in shared memory.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._mosaic_gpu.backward.scheduler import ProgramSchedule, fold_steps, slot_of
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE
from pallas_kernels._mosaic_gpu.padding import FLAG_WIDTH

_ROW_BUFFERS = {
    "shift": ((QUERY_TILE,), jnp.float32),
    "delta": ((QUERY_TILE,), jnp.float32),
    "start": ((QUERY_TILE,), jnp.int32),
    "end": ((QUERY_TILE,), jnp.int32),
    "padding": ((FLAG_WIDTH,), jnp.int32),
}
"""Shape and dtype of the arrays that have one number for each query, and of the padding flag."""


class StepCopies(NamedTuple):
    """What the producer copies at each step and signals on one barrier.

    Attributes:
        names: of the arrays.
        slots: how many steps of them shared memory holds.
    """

    names: tuple[str, ...]
    slots: int


def row_buffers(copies: Mapping[str, StepCopies]) -> dict[str, Any]:
    """Types of the buffers in shared memory for one number of each query, and for flags."""
    return {
        name: plgpu.SMEM((arrays.slots, *_ROW_BUFFERS[name][0]), _ROW_BUFFERS[name][1])
        for arrays in copies.values()
        for name in arrays.names
        if name in _ROW_BUFFERS
    }


def produce(
    program: ProgramSchedule,
    refs: dict[str, Any],
    smem: dict[str, Any],
    barriers: dict[str, Any],
    copies: Mapping[str, StepCopies],
) -> None:
    """Copies keys and values once, and the arrays of each step.

    Args:
        program: the schedule of the program.
        refs: arrays in global memory.
        smem: buffers, with slots in front but for keys and values.
        barriers: "key"; and for each name in ``copies`` a barrier on which copies arrive, and one
            with "_free" on which the consumers arrive when they have read a slot.
        copies: the arrays of each barrier.
    """
    size, row = program.launch.key_tile, program.row
    for name in ("key", "value"):
        src = refs[name].at[row, pl.ds(program.key_block * size, size), program.kv_head]
        plgpu.copy_gmem_to_smem(src, smem[name], barriers["key"])

    def step(head, query_block, number, _):
        rows = pl.ds(query_block * QUERY_TILE, QUERY_TILE)
        indices = {
            "query": (row, rows, head),
            "dout": (row, rows, head),
            "shift": (row, head, rows),
            "delta": (row, head, rows),
            "start": (row, rows),
            "end": (row, rows),
            "padding": (row, query_block),
        }
        for barrier, arrays in copies.items():
            slot = slot_of(number, arrays.slots)
            # Until the consumers have read what the slot held.
            plgpu.barrier_wait(barriers[barrier + "_free"].at[slot])
            for name in arrays.names:
                src, dst = refs[name].at[indices[name]], smem[name].at[slot]
                plgpu.copy_gmem_to_smem(src, dst, barriers[barrier].at[slot])

    fold_steps(program, step, None)
