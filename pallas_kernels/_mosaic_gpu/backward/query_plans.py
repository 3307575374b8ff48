"""Which tiles of queries the programs of a fused Mosaic GPU backward kernel visit.

`pallas_kernels._tile_ranges.query_plan`, changed so that each program can say how many others add
to a tile of queries before it.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE, BackwardSchedule
from pallas_kernels._mosaic_gpu.primitives import Index
from pallas_kernels._spec import Spec
from pallas_kernels._tile_ranges import QueryColumns, query_plan

FIRST_BLOCK = 4
"""The column that `plan_with_first_block` adds to those of `QueryColumns.ALL`."""


def plan_of_launch(
    spec: Spec, queries: Queries, schedule: BackwardSchedule, *, rows: int
) -> Int[Array, "#B tiles 4"]:
    """The tiles of the first ``rows`` queries that the program of each tile of keys visits."""
    start, end = queries.start, queries.end
    packed, has_ends_by_row = start.ndim > 0, end is not None and end.ndim > 0
    plan = query_plan(
        start,
        spec.window,
        0,
        rows=rows,
        query_tile=QUERY_TILE,
        offset=schedule.offset,
        length=schedule.num_keys,
        key_tile=schedule.key_tile,
        min_distance=0,
        end=end if has_ends_by_row else None,
    )
    plan = plan if packed else plan[None]
    if has_ends_by_row:
        return plan_in_order(plan)
    plan = plan_with_diagonal(plan, schedule)
    return plan if end is None else plan_masked_outside(plan, schedule, start, end)


def plan_with_diagonal(
    plan: Int[Array, "B tiles 4"], schedule: BackwardSchedule
) -> Int[Array, "B tiles 4"]:
    """The `query_plan` in which all own keys see the queries at their own positions.

    So each tile of queries has a program that writes its gradient, also a tile of padding.
    """
    number = jnp.arange(1, schedule.num_key_tiles + 1, dtype=jnp.int32)
    diagonal_end = (number * schedule.key_tile + schedule.offset) // QUERY_TILE
    return plan.at[..., QueryColumns.END].max(jnp.minimum(diagonal_end, schedule.num_query_tiles))


def plan_in_order(plan: Int[Array, "B tiles 4"]) -> Int[Array, "B tiles 4"]:
    """The `query_plan`, where documents have ends, in which no tile of keys ends before another.

    They begin in their order anyway. So the programs that add to a tile of queries are consecutive.
    """
    end = QueryColumns.END
    return plan.at[..., end].set(lax.cummax(plan[..., end], axis=plan.ndim - 2))


def last_key_blocks(
    plan: Int[Array, "B tiles 4"], schedule: BackwardSchedule
) -> Int[Array, "B query_tiles"]:
    """The last tile of keys whose program adds to each tile of queries: it adds first."""
    block = jnp.arange(schedule.num_query_tiles, dtype=jnp.int32)[:, None]
    return (plan[:, None, :, QueryColumns.BEGIN] <= block).sum(-1, dtype=jnp.int32) - 1


def plan_with_first_block(plan: Int[Array, "B tiles 4"]) -> Int[Array, "B tiles 5"]:
    """A `query_plan` without documents, and in each row the first tile of keys that is seen.

    All tiles behind that one are seen too.
    """
    is_seen_by_none = plan[..., QueryColumns.END] <= plan[..., QueryColumns.BEGIN]
    first = is_seen_by_none.sum(1, dtype=jnp.int32)
    first = jnp.broadcast_to(first[:, None, None], (*plan.shape[:2], 1))
    return jnp.concatenate((plan, first), axis=-1)


def plan_masked_outside(
    plan: Int[Array, "B tiles 4"],
    schedule: BackwardSchedule,
    start: Index,
    end: Index,
) -> Int[Array, "B tiles 4"]:
    """The plan with masks for all tiles that hold keys outside of the one sequence.

    Which tiles a program visits stays as it is: the program that adds next waits for this one.
    """
    first = jnp.arange(schedule.num_key_tiles, dtype=jnp.int32) * schedule.key_tile
    first += schedule.offset
    masked = ((first < start) | (first + schedule.key_tile > end))[None]
    unmasked_begin, unmasked_end = QueryColumns.UNMASKED_BEGIN, QueryColumns.UNMASKED_END
    new_end = jnp.where(masked, plan[..., unmasked_begin], plan[..., unmasked_end])
    return plan.at[..., unmasked_end].set(new_end)
