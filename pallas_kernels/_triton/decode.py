"""Decoding in Pallas-Triton: the attention of one token a row to the keys of a cache.

A program of the kernel has one head of keys with all its query heads, and a part of the keys, so
that a small batch keeps all multiprocessors busy too. It reads its keys and values once. XLA adds
up the parts.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Float32

from pallas_kernels._logits import LOG2_E, LOWEST
from pallas_kernels._spec import SlotBounds, Slots, Spec
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


def decode(
    spec: Spec,
    query: Float[Array, "B K G H"],
    runs: tuple[Slots, ...],
    bounds: SlotBounds,
    sink_logits: Float[Array, "N"] | None,
    *,
    num_sms: int,
    interpret: bool,
) -> Float32[Array, "B K G Hv"]:
    """Attention of one token a row; arguments as of `_one_query.attend_one_query`."""
    batch, num_kv_heads, group, _ = query.shape
    num_keys = runs[0][0].shape[2]
    plan = DecodePlan.of(num_keys, batch * num_kv_heads, num_sms)
    parts = _decode_parts(spec, query, runs, bounds, plan, interpret=interpret)
    learned = None
    if sink_logits is not None:
        learned = sink_logits.astype(jnp.float32).reshape(num_kv_heads, group) * LOG2_E
    return _combined(*parts, learned)


def _decode_parts(
    spec: Spec,
    query: Float[Array, "B K G H"],
    runs: tuple[Slots, ...],
    bounds: SlotBounds,
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
        bounds: which slots each row's token sees.
        plan: of the launch.
        interpret: whether Pallas' interpreter runs the kernel.

    Returns:
        Weighted values, the largest logit in base 2 or `LOWEST`, and the sum of the weights.
    """
    batch, num_kv_heads, group, _ = query.shape
    key, value = runs[0]
    num_keys, value_dim = key.shape[2], value.shape[3]
    parts = pl.cdiv(num_keys, plan.keys)
    sums_shape = (batch, num_kv_heads, parts, group)
    shapes = (
        shape_like_varying(query, (*sums_shape, value_dim), jnp.float32),
        shape_like_varying(query, sums_shape, jnp.float32),
        shape_like_varying(query, sums_shape, jnp.float32),
    )

    program = _Program(spec, plan, group, num_keys, value_dim, interpret)
    return pl.pallas_call(
        program.run,
        grid=(batch, num_kv_heads, parts),
        in_specs=[
            _block_of_head(query),
            pl.BlockSpec((None, bounds.shape[1]), lambda b, k, n: (b, 0)),
            jax.tree.map(_block_of_head, runs),
        ],
        out_specs=[_block_of_part(x) for x in shapes],
        out_shape=list(shapes),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=plan.stages),
        interpret=interpret,
        name="ring_swa_decode",
    )(query, bounds, runs)


class _Program(NamedTuple):
    """What a program does: one head of keys, and one part of the keys.

    Attributes:
        spec: scale and cap.
        plan: of the launch.
        group: query heads of the head of keys.
        num_keys: slots of the rolling buffer.
        value_dim: Hv.
        interpret: run in the interpreter.
    """

    spec: Spec
    plan: DecodePlan
    group: int
    num_keys: int
    value_dim: int
    interpret: bool

    @property
    def rows(self) -> int:
        """Rows of the matrix of queries: the group's, and as many more as a product needs."""
        return max(SMALLEST_DOT, pl.next_power_of_2(self.group))

    def run(self, query_ref: Any, bounds_ref: Any, run_refs: Any, *out_refs: Any) -> None:
        """Attends the part, and the sinks if it is the first one."""
        plan, rows = self.plan, self.rows
        part = pl.program_id(2)
        last, reach, seen_sinks = (bounds_ref[n] for n in range(3))
        is_query = jnp.arange(rows, dtype=jnp.int32) < self.group
        all_rows = pl.ds(jnp.int32(0), rows)
        queries = load_rows(query_ref, (all_rows,), is_query)

        def step(n, sums):
            first = part * plan.keys + n * plan.tile
            slot = first + jnp.arange(plan.tile, dtype=jnp.int32)
            before = last - slot
            before = jnp.where(before < 0, before + self.num_keys, before)
            seen = (slot < self.num_keys) & (before <= reach)
            return self._visit(queries, run_refs[0], first, seen, sums)

        acc = [jnp.zeros((rows, width), jnp.float32) for _, width in head_parts(self.value_dim)]
        sums = (jnp.full((rows,), LOWEST, jnp.float32), jnp.zeros((rows,), jnp.float32), *acc)
        for refs in run_refs[1:]:
            slots = max(SMALLEST_DOT, pl.next_power_of_2(refs[0].shape[0]))
            seen = jnp.arange(slots, dtype=jnp.int32) < jnp.where(part == 0, seen_sinks, 0)
            sums = self._visit(queries, refs, jnp.int32(0), seen, sums)
        steps = np.int32(pl.cdiv(min(plan.keys, self.num_keys), plan.tile))
        row_max, row_sum, *acc = jax.lax.fori_loop(np.int32(0), steps, step, sums)
        store_rows(out_refs[0], (all_rows,), acc, is_query)
        for ref, x in zip(out_refs[1:], (row_max, row_sum), strict=True):
            plgpu.store(ref.at[all_rows], x, mask=is_query)

    def _visit(
        self, queries: list[Array], refs: Any, first: Array, seen: Array, sums: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        """A step of the softmax with the slots from ``first`` on, as many as ``seen`` speaks of."""
        slots = seen.size
        keys, values = (load_rows(ref, (pl.ds(first, slots),), seen) for ref in refs)
        seen = jnp.broadcast_to(seen[None], (self.rows, slots))
        return softmax_step(self.spec, queries, self.interpret, sums, keys, values, seen)


def _block_of_head(x: Any) -> pl.BlockSpec:
    """All of a head, of [B, K, ...]."""
    zeros = (0,) * (x.ndim - 2)
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, k, n: (b, k, *zeros))


def _block_of_part(x: Any) -> pl.BlockSpec:
    """All of a head and part, of [B, K, parts, ...]."""
    zeros = (0,) * (x.ndim - 3)
    return pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, k, n: (b, k, n, *zeros))


def _combined(
    sums: Float32[Array, "B K parts G Hv"],
    part_max: Float32[Array, "B K parts G"],
    part_sum: Float32[Array, "B K parts G"],
    learned: Float32[Array, "K G"] | None,
) -> Float32[Array, "B K G Hv"]:
    """Attention to all keys from that to each part of them, as `_decode_parts` leaves it.

    Written out for each part, so that XLA makes one kernel of it; of reductions it makes several.
    """
    parts = range(sums.shape[2])
    row_max = functools.reduce(jnp.maximum, [part_max[:, :, n] for n in parts])
    row_sum = jnp.zeros_like(row_max)
    if learned is not None:
        row_max = jnp.maximum(row_max, learned[None])
        row_sum = jnp.exp2(learned[None] - row_max)
    weights = [jnp.exp2(part_max[:, :, n] - row_max) for n in parts]
    row_sum += sum(weights[n] * part_sum[:, :, n] for n in parts)
    inverse = jnp.where(row_sum > 0, 1 / row_sum, 0.0)
    out = [(weights[n] * inverse)[..., None] * sums[:, :, n] for n in parts]
    return functools.reduce(jnp.add, out)
