"""What `fused` and `fused_wide_heads` share: arrays, masks, the producer, and the launch.

A program has four warpgroups. Two are consumers: they compute. One is the producer: it copies keys,
values, queries and the gradients of outputs to shared memory through TMA. One adds the gradients of
queries to those of other programs (`dq_accumulate`). `tasks` and `scheduler` say what a program
computes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32, Int

from pallas_kernels._kernels import Queries
from pallas_kernels._masks import sees
from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward import dkv_reduce, dq_postprocess
from pallas_kernels._mosaic_gpu.backward.launch import WARPGROUPS_APART, launch
from pallas_kernels._mosaic_gpu.backward.query_plans import (
    last_key_blocks,
    plan_in_order,
    plan_with_diagonal,
    plan_with_first_block,
)
from pallas_kernels._mosaic_gpu.backward.scheduler import ProgramSchedule, fold_steps, slot_of
from pallas_kernels._mosaic_gpu.backward.softmax import padded_lse_and_delta
from pallas_kernels._mosaic_gpu.backward.task_splits import split_last_tasks
from pallas_kernels._mosaic_gpu.backward.tasks import (
    QUERY_TILE,
    BackwardSchedule,
    halo_is_better_last,
)
from pallas_kernels._mosaic_gpu.padding import FLAG_WIDTH, padding_flags, zero_padding
from pallas_kernels._mosaic_gpu.primitives import (
    MATRIX,
    ROW,
    ROWS,
    broadcast_row,
    load_as,
    opaque_to_compiler,
)
from pallas_kernels._spec import KeyRun, Spec
from pallas_kernels._tile_ranges import query_plan, seen_tiles


class StepCopies(NamedTuple):
    """What the producer copies at each step and signals on one barrier.

    Attributes:
        names: of the arrays.
        slots: how many steps of them shared memory holds.
    """

    names: tuple[str, ...]
    slots: int


class KeyBounds(NamedTuple):
    """Positions of the first key that any query sees, and behind the last; None: no mask for it."""

    first: Int[Array, ""] | None
    stop: Int[Array, ""] | int | None


class BackwardPipeline:
    """A launch of a fused backward kernel.

    Args:
        spec: static settings.
        queries: queries of the shard, and what belongs to them.
        run: keys and values.
        rows: number of queries.
        key_tile: keys of a program.
        columns: of the slices in which gradients of queries are added up.
        num_sms: multiprocessors of the GPU.
        deterministic: whether they are added up in a fixed order.
        epilogue: makes dq of the sums, in the program that adds last; None leaves the sums to
            `dq_postprocess`.
        sums: of other launches, to which this one adds in place; None: there are none.
    """

    def __init__(
        self,
        spec: Spec,
        queries: Queries,
        run: KeyRun,
        *,
        rows: int,
        key_tile: int,
        columns: int,
        num_sms: int,
        deterministic: bool,
        epilogue: dq_postprocess.DqEpilogue | None = None,
        sums: dq_postprocess.DqSums | None = None,
    ):
        query, start, end = queries.query, queries.start, queries.end
        self.spec, self.run, self.query = spec, run, query
        self.deterministic, self.epilogue, self.sums = deterministic, epilogue, sums
        self.batch, _, self.heads, self.dim = query.shape
        self.packed = start.ndim > 0
        self.has_ends_by_row = end is not None and end.ndim > 0
        self.schedule = backward_schedule(
            spec, queries, run, rows=rows, key_tile=key_tile, num_sms=num_sms
        )
        plan = query_plan(
            start, spec.window, 0, rows=rows, query_tile=QUERY_TILE,
            offset=run.offset, length=run.key.shape[1], key_tile=key_tile, min_distance=0,
            end=end if self.has_ends_by_row else None,
        )  # fmt: skip
        plan = plan if self.packed else plan[None]
        if self.has_ends_by_row:
            plan = plan_in_order(plan)
        else:
            plan = plan_with_diagonal(plan, self.schedule)
            if end is not None:
                plan = _masked_outside(plan, self.schedule, start, end)
        self.seen = seen_tiles(plan, self.schedule.num_query_tiles) if sums is None else sums.seen
        if self.schedule.halo_last:
            plan = plan_with_first_block(plan)
        self.operands = self._operands(queries, plan)
        if epilogue is not None:
            has_own_keys = run.offset + run.key.shape[1] > 0
            assert sums is None
            assert deterministic and has_own_keys
            assert not self.schedule.longest_first and not self.schedule.halo_last
        self.dquery_tile = (self.dim // columns, *register_tiles.tile_shape(columns))

    def _operands(self, queries: Queries, plan: Int[Array, "#B tiles _"]) -> dict[str, Any]:
        """The arrays that the kernel reads, by name."""
        query, dout, lse, delta, start, end = queries
        length = self.schedule.num_query_tiles * QUERY_TILE
        operands = {
            "query": query,
            "dout": dout,
            **padded_lse_and_delta(self.spec, lse, delta, length),
            "key": self.run.key,
            "value": self.run.value,
            "plan": plan,
        }
        if end is not None and not end.ndim:
            operands["bounds"] = jnp.stack([start, end])
        pad = ((0, 0), (0, -query.shape[1] % QUERY_TILE))
        if self.packed:
            operands["start"] = jnp.pad(start, pad, mode="edge")
            operands["padding"] = padding_flags(start, self.spec.first_key)
        if self.has_ends_by_row:
            assert end is not None
            operands["end"] = jnp.pad(end, pad, mode="edge")
            operands["last_block"] = last_key_blocks(plan, self.schedule)
        return operands

    @property
    def starts_and_flags(self) -> tuple[str, ...]:
        """Arrays that tell of documents and padding, which come with the queries."""
        ends = ("end",) if self.has_ends_by_row else ()
        return ("start", *ends, "padding") if self.packed else ()

    def row_buffers(self, copies: Mapping[str, StepCopies]) -> dict[str, Any]:
        """Types of the buffers in shared memory for one number of each query, and for flags."""
        types = {
            "shift": ((QUERY_TILE,), jnp.float32),
            "delta": ((QUERY_TILE,), jnp.float32),
            "start": ((QUERY_TILE,), jnp.int32),
            "end": ((QUERY_TILE,), jnp.int32),
            "padding": ((FLAG_WIDTH,), jnp.int32),
        }
        return {
            name: plgpu.SMEM((arrays.slots, *types[name][0]), types[name][1])
            for arrays in copies.values()
            for name in arrays.names
            if name in types
        }

    def program_schedule(self, refs: dict[str, Any]) -> ProgramSchedule:
        """The schedule of the program that asks."""
        index = lax.axis_index("program")
        bounds = refs.get("start"), refs.get("last_block")
        return ProgramSchedule(self.schedule, index, refs["plan"], *bounds)

    def key_bounds(self, refs: dict[str, Any]) -> KeyBounds:
        """The positions of the keys that any query sees, where tiles hold others too."""
        stop = None
        if self.schedule.num_keys % self.schedule.key_tile:
            stop = self.run.offset + self.schedule.num_keys
        if "bounds" not in refs:
            return KeyBounds(None, stop)
        first, end = refs["bounds"][0], refs["bounds"][1]
        return KeyBounds(first, end if stop is None else jnp.minimum(end, stop))

    def mask(
        self,
        bounds_smem: tuple[Any, Any],
        first_key: Int[Array, ""],
        key_bounds: KeyBounds,
        query_block: Int[Array, ""],
        weights: Float32[Array, "64 queries"],
    ) -> Float32[Array, "64 queries"]:
        """Weights of `ROWS` keys from a position on, zero where queries do not see them.

        ``bounds_smem`` are starts and ends of the queries' sequences, as `query_bounds` gives them.
        """
        j = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERY_TILE), 0, layout=MATRIX)
        i = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERY_TILE), 1, layout=MATRIX)
        i, j = i * opaque_to_compiler(1) + query_block * QUERY_TILE, j + first_key
        starts, ends = (None if x is None else broadcast_row(load_as(x, ROW)) for x in bounds_smem)
        seen = sees(i, j, starts, self.spec.window, 0, packed=self.packed, end=ends)
        if key_bounds.first is not None:
            seen &= j >= key_bounds.first
        if key_bounds.stop is not None:
            seen &= j < key_bounds.stop
        return jnp.where(seen, weights, 0.0)

    def query_bounds(self, smem: dict[str, Any], slot: Int[Array, ""]) -> tuple[Any, Any]:
        """Refs of where the sequences of a tile's queries start and end; None if there is none."""
        start = smem["start"].at[slot] if self.packed else None
        return start, smem["end"].at[slot] if self.has_ends_by_row else None

    def zero_padding_of_queries(
        self,
        smem: dict[str, Any],
        slot: Int[Array, ""],
        query_block: Int[Array, ""],
        names: Mapping[str, Int[Array, ""] | int],
    ) -> None:
        """Zeros in a tile's padding rows; of the arrays ``names``, with the slots where they are.

        The tile's starts and flag have the slot ``slot``.
        """
        if not self.packed:
            return

        @pl.when(smem["padding"][slot, 0] != 0)
        def write():
            tiles = [smem[name].at[opaque_to_compiler(n)] for name, n in names.items()]
            first = query_block * QUERY_TILE
            first = first + self.spec.first_key if self.spec.lookahead else first
            zero_padding(tiles, smem["start"].at[slot], first)

    def zero_padding_of_keys(
        self,
        refs: dict[str, Any],
        smem: dict[str, Any],
        schedule: ProgramSchedule,
        first_row: int | Int[Array, ""] = 0,
    ) -> None:
        """Zeros in the padding among `ROWS` rows of the tile of own keys and values.

        Those of a halo have been zeros when it was sent, and all are where keys are moved.
        """
        only_halo = self.schedule.halo_key_tiles == self.schedule.num_key_tiles
        if not self.packed or only_halo or self.spec.lookahead:
            return
        position = schedule.key_block * self.schedule.key_tile + self.run.offset + first_row
        tiles = pl.cdiv(self.query.shape[1], ROWS)
        tile = lax.div(jnp.maximum(position, 0), jnp.int32(ROWS))
        has_starts = (position >= 0) & (tile < tiles)
        tile = jnp.minimum(tile, tiles - 1)

        @pl.when(has_starts & (refs["padding"][schedule.row, tile, 0] != 0))
        def write():
            rows = pl.ds(first_row, ROWS)
            starts = refs["start"].at[schedule.row, pl.ds(tile * ROWS, ROWS)]
            zero_padding([smem[name].at[rows] for name in ("key", "value")], starts, position)

    def produce(
        self,
        refs: dict[str, Any],
        smem: dict[str, Any],
        barriers: dict[str, Any],
        copies: Mapping[str, StepCopies],
    ) -> None:
        """The producer: copies keys and values once, and the arrays of each step.

        Args:
            refs: arrays in global memory.
            smem: buffers, with slots in front but for keys and values.
            barriers: "key", and for each name in ``copies`` a barrier on which copies arrive, and
                one with "_free" on which the consumers arrive when they have read a slot.
            copies: the arrays of each barrier.
        """
        schedule, size = self.program_schedule(refs), self.schedule.key_tile
        for name in ("key", "value"):
            src = refs[name].at[
                schedule.row, pl.ds(schedule.key_block * size, size), schedule.kv_head
            ]
            plgpu.copy_gmem_to_smem(src, smem[name], barriers["key"])

        def step(head, query_block, number, _):
            rows = pl.ds(query_block * QUERY_TILE, QUERY_TILE)
            indices = {
                "query": (schedule.row, rows, head),
                "dout": (schedule.row, rows, head),
                "shift": (schedule.row, head, rows),
                "delta": (schedule.row, head, rows),
                "start": (schedule.row, rows),
                "end": (schedule.row, rows),
                "padding": (schedule.row, query_block),
            }
            for barrier, arrays in copies.items():
                slot = slot_of(number, arrays.slots)
                plgpu.barrier_wait(barriers[barrier + "_free"].at[slot])
                for name in arrays.names:
                    src, dst = refs[name].at[indices[name]], smem[name].at[slot]
                    plgpu.copy_gmem_to_smem(src, dst, barriers[barrier].at[slot])

        fold_steps(schedule, step, None)

    def launch(
        self,
        consume: Callable[..., None],
        accumulate_dq: Callable[..., None],
        copies: Mapping[str, StepCopies],
        smem: dict[str, Any],
        barriers: dict[str, Any],
        dkey_dtype: jnp.dtype,
    ) -> tuple[Float[Array, "B *_"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """Runs the kernel.

        Args:
            consume: ``consume(refs, smem, barriers, warpgroup)``, of warpgroups 0 and 1.
            accumulate_dq: ``accumulate_dq(refs, smem, barriers)``, of warpgroup 3.
            copies: what `produce` copies, in warpgroup 2.
            smem: types of the buffers in shared memory.
            barriers: types of the barriers.
            dkey_dtype: of dkey and dvalue.

        Returns:
            The slices of `DqSums`, or with an epilogue dquery; dkey; dvalue.
        """
        semaphores, outputs, partial_sums = self._results(dkey_dtype)
        operands = self.operands | {
            name: jax.new_ref(jnp.zeros(shape, jnp.int32)) for name, shape in semaphores.items()
        }
        if self.sums is not None:
            del outputs["dquery_sums"]
            operands["dquery_sums"] = jax.new_ref(self.sums.slices)

        def ring_swa_backward_fused(refs):
            def body(smem, barriers):
                warpgroup = lax.axis_index("warpgroup")

                # A multiprocessor has 512 registers for each thread of a warpgroup.
                @pl.when(warpgroup < 2)
                def consumers():
                    plgpu.set_max_registers(232, action="increase")
                    consume(refs, smem, barriers, warpgroup)

                @pl.when(warpgroup == 2)
                def producer():
                    plgpu.set_max_registers(24, action="decrease")
                    self.produce(refs, smem, barriers, copies)

                @pl.when(warpgroup == 3)
                def dq_accumulator():
                    plgpu.set_max_registers(24, action="decrease")
                    accumulate_dq(refs, smem, barriers)

            pl.run_scoped(body, smem, barriers, collective_axes="warpgroup")

        found = launch(
            ring_swa_backward_fused,
            operands,
            outputs | partial_sums,
            programs=self.schedule.programs,
            varies_as=self.query,
            compiler_params=WARPGROUPS_APART,
            warpgroups=4,
        )
        if self.sums is not None:
            dquery = jax.freeze(operands["dquery_sums"])
        else:
            dquery = found["dquery_sums" if self.epilogue is None else "out"]
        return dquery, found["dkey"], found["dvalue"]

    def _results(self, dkey_dtype: jnp.dtype):
        """Shapes of semaphores, types of outputs, and of the partial sums of split tasks."""
        tiles = self.batch, self.heads, self.schedule.num_query_tiles
        # Each tile of queries has a semaphore: how many programs have added to its gradients.
        semaphores = {"adders": tiles} | dkv_reduce.semaphore_shapes(self.schedule)
        outputs = {
            "dquery_sums": jax.ShapeDtypeStruct((*tiles, *self.dquery_tile), jnp.float32),
            "dkey": jax.ShapeDtypeStruct(self.run.key.shape, dkey_dtype),
            "dvalue": jax.ShapeDtypeStruct(self.run.value.shape, dkey_dtype),
        }
        if self.epilogue is not None:
            outputs["out"] = self.epilogue.out_type
        dims = {"dkey": self.dim, "dvalue": self.run.value.shape[3]}
        return semaphores, outputs, dkv_reduce.partial_sum_types(self.schedule, dims)


def _masked_outside(
    plan: Int[Array, "B tiles 4"],
    schedule: BackwardSchedule,
    start: Int[Array, ""],
    end: Int[Array, ""],
) -> Int[Array, "B tiles 4"]:
    """The plan with masks for all tiles that hold keys outside of the sequence.

    Which tiles a program visits stays as it is: the program that adds next waits for this one.
    """
    first = jnp.arange(schedule.num_key_tiles, dtype=jnp.int32) * schedule.key_tile
    first += schedule.offset
    masked = ((first < start) | (first + schedule.key_tile > end))[None]
    unmasked_end = jnp.where(masked, plan[..., 1], plan[..., 2])
    return plan.at[..., 2].set(unmasked_end)


def backward_schedule(
    spec: Spec, queries: Queries, run: KeyRun, *, rows: int, key_tile: int, num_sms: int
) -> BackwardSchedule:
    """The schedule of a launch; arguments as of `BackwardPipeline`."""
    batch, _, heads, _ = queries.query.shape
    _, num_keys, num_kv_heads, _ = run.value.shape
    has_own_keys = run.offset + num_keys > 0
    num_key_tiles = pl.cdiv(num_keys, key_tile)
    schedule = BackwardSchedule(
        num_kv_heads=num_kv_heads,
        group_size=heads // num_kv_heads,
        batch_kv_heads=num_kv_heads * batch,
        key_tile=key_tile,
        num_keys=num_keys,
        num_key_tiles=num_key_tiles,
        num_query_tiles=pl.cdiv(rows, QUERY_TILE),
        offset=run.offset,
        halo_key_tiles=-run.offset // key_tile if has_own_keys else num_key_tiles,
        packed=queries.start.ndim > 0,
        window=spec.window,
        has_ends=queries.end is not None,
    )
    if queries.end is None and halo_is_better_last(schedule, num_sms):
        schedule = dataclasses.replace(schedule, halo_last=True)
    return split_last_tasks(schedule, num_sms)
