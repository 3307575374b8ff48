"""Decoding kernel in Pallas-Triton: the attention of one query a head to keys with heads first.

A program has one head of keys with all its query heads, and a part of the keys, so that a small
batch keeps all multiprocessors busy too. It reads its keys and values once. XLA adds up the parts.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Float32, Int

from pallas_kernels._logits import LOWEST
from pallas_kernels._spec import Spec
from pallas_kernels._triton.blocks import head_parts, load_rows, store_rows
from pallas_kernels._triton.forward import softmax_step
from pallas_kernels._varying import shape_like_varying

SMALLEST_DOT = 16
"""Rows of an operand of a matrix product in Triton at least."""


MOST_PARTS = 32
"""Parts of the keys about at most: an operation of XLA's for each adds them up."""


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """How a launch is cut.

    Attributes:
        keys: of a program, a multiple of ``tile``.
        tile: keys that a step takes.
        warps: of a program.
        stages: tiles in shared memory.
    """

    keys: int
    tile: int = 64
    warps: int = 4
    stages: int = 3

    @classmethod
    def of(cls, num_keys: int, batch_kv_heads: int, num_sms: int) -> "DecodePlan":
        """About two programs on each multiprocessor, of 64 to 1024 keys: the fastest on an H100.

        Longer caches have longer parts.
        """
        keys = min(1024, num_keys * batch_kv_heads // (2 * num_sms))
        return cls(pl.cdiv(max(1, keys, num_keys // MOST_PARTS), 64) * 64)


def decode_parts(
    spec: Spec,
    query: Float[Array, "B K G H"],
    runs: tuple[tuple[Float[Array, "B K _ H"], Float[Array, "B K _ Hv"]], ...],
    bounds: Int[Array, "B 4"],
    plan: DecodePlan,
    *,
    interpret: bool,
) -> tuple[
    Float32[Array, "B K parts G Hv"], Float32[Array, "B K parts G"], Float32[Array, "B K parts G"]
]:
    """Attention to each part of the keys, before it is divided by the sums of the weights.

    Args:
        spec: scale and cap.
        query: of one token a row.
        runs: the rolling buffer, and the sinks if there are any.
        bounds: of each row the slot of the last key; how far before this, going round the buffer,
            the first key is that the query sees, negative for none; how many sinks it sees; 0.
        plan: of the launch.
        interpret: whether Pallas' interpreter runs the kernel.

    Returns:
        Weighted values, the largest logit in base 2 or `LOWEST`, and the sum of the weights.
    """
    batch, num_kv_heads, group, _ = query.shape
    key, value = runs[0]
    num_keys, value_dim = key.shape[2], value.shape[3]
    parts = pl.cdiv(num_keys, plan.keys)
    rows = max(SMALLEST_DOT, pl.next_power_of_2(group))
    sums_shape = (batch, num_kv_heads, parts, group)
    shapes = (
        shape_like_varying(query, (*sums_shape, value_dim), jnp.float32),
        shape_like_varying(query, sums_shape, jnp.float32),
        shape_like_varying(query, sums_shape, jnp.float32),
    )

    def of_head(x: Any) -> pl.BlockSpec:
        zeros = (0,) * (x.ndim - 2)
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, k, n: (b, k, *zeros))

    def of_part(x: Any) -> pl.BlockSpec:
        zeros = (0,) * (x.ndim - 3)
        return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, k, n: (b, k, n, *zeros))

    def kernel(query_ref, bounds_ref, run_refs, *out_refs):
        part = pl.program_id(2)
        last, reach, seen_sinks = (bounds_ref[n] for n in range(3))
        is_query = jnp.arange(rows, dtype=jnp.int32) < group
        all_rows = pl.ds(jnp.int32(0), rows)
        queries = load_rows(query_ref, (all_rows,), is_query)
        step = partial(softmax_step, spec, queries, interpret)

        def visit(refs, first, slots, seen, sums):
            keys, values = (load_rows(ref, (pl.ds(first, slots),), seen) for ref in refs)
            return step(sums, keys, values, jnp.broadcast_to(seen[None], (rows, slots)))

        def tile(n, sums):
            first = part * plan.keys + n * plan.tile
            slot = first + jnp.arange(plan.tile, dtype=jnp.int32)
            before = last - slot
            before = jnp.where(before < 0, before + num_keys, before)
            return visit(run_refs[0], first, plan.tile, (slot < num_keys) & (before <= reach), sums)

        acc = [jnp.zeros((rows, width), jnp.float32) for _, width in head_parts(value_dim)]
        sums = (jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), *acc)
        for refs in run_refs[1:]:  # the first part has the sinks too
            slots = max(SMALLEST_DOT, pl.next_power_of_2(refs[0].shape[0]))
            seen = jnp.arange(slots, dtype=jnp.int32) < jnp.where(part == 0, seen_sinks, 0)
            sums = visit(refs, jnp.int32(0), slots, seen, sums)
        tiles = np.int32(pl.cdiv(min(plan.keys, num_keys), plan.tile))
        row_max, row_sum, *acc = jax.lax.fori_loop(np.int32(0), tiles, tile, sums)
        store_rows(out_refs[0], (all_rows,), acc, is_query)
        for ref, x in zip(out_refs[1:], (row_max, row_sum), strict=True):
            plgpu.store(ref.at[all_rows], x, mask=is_query)

    return pl.pallas_call(
        kernel,
        grid=(batch, num_kv_heads, parts),
        in_specs=[
            of_head(query),
            pl.BlockSpec((None, bounds.shape[1]), lambda b, k, n: (b, 0)),
            jax.tree.map(of_head, runs),
        ],
        out_specs=[of_part(x) for x in shapes],
        out_shape=list(shapes),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name="ring_swa_decode",
    )(query, bounds, runs)
