"""Which tiles of queries the programs of a fused Mosaic GPU backward kernel visit.

`pallas_kernels._tile_ranges.query_plan`, changed so that each program can say how many others add
to a tile of queries before it.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE, BackwardSchedule


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
