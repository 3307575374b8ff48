"""How the programs of the fused Mosaic GPU backward kernels add up the gradients of queries.

The consumers of a program store a tile's gradients in shared memory. A warpgroup of its own, the dq
accumulator, adds them to the sums in global memory by TMA, in float32.

Each tile of queries has a semaphore: how many programs have added to its sums. In the deterministic
kernels a program waits until all programs that come before it have added, so that results repeat
their bits. In the others it only waits until the first one has stored, as all others add to that.

In a fixed order a program knows whether it adds last. It can then make the result from the sums
itself (`DqEpilogue`), so that no other kernel has to read them again.

`dq_accumulate_tiles` and `dq_accumulate_slices` are the accumulators of the two kernels. Here is
what they share.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._mosaic_gpu.backward.pipeline import BackwardPipeline
from pallas_kernels._mosaic_gpu.backward.scheduler import ProgramSchedule
from pallas_kernels._mosaic_gpu.primitives import Index, semaphore_signal_and_wait


def adders_to_wait_for(
    pipeline: BackwardPipeline, program: ProgramSchedule, query_block: Index
) -> Index:
    """How many programs must have added to a tile of queries before this one does."""
    number = program.adders_before(query_block)
    return number if pipeline.deterministic else jnp.minimum(number, 1)


def signals_others(pipeline: BackwardPipeline, before: Index) -> Index:
    """Whether other programs wait until this one has added, after ``before`` programs.

    In a fixed order the next one does. Else only the first one, which stores, is waited for.
    """
    return jnp.int32(1 if pipeline.deterministic else before == 0)


def store_or_add(pipeline: BackwardPipeline, src: Any, dst: Any, before: Index) -> None:
    """Copies to global memory if no program or launch has added before, else adds."""

    def copy(reduction):
        plgpu.copy_smem_to_gmem(src, dst, commit_group=False, reduction_op=reduction)

    if pipeline.sums is not None:
        copy("add")
        return
    pl.when(before == 0)(partial(copy, None))
    pl.when(before > 0)(partial(copy, "add"))


def signal_last_step(semaphore: Any, signals: Index) -> None:
    """Signals the last step, and waits until all copies have been written."""
    semaphore_signal_and_wait(semaphore, signals, semaphore, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)
