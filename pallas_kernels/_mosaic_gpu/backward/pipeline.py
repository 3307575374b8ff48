"""The launch of `fused` and of `fused_wide_heads`: its arrays, and the roles of its warpgroups.

A program has four warpgroups. Two are consumers: they compute, each kernel in its own way. One is
the `producer`: it copies keys, values, queries and the gradients of outputs to shared memory
through TMA. One adds the gradients of queries to those of other programs (`dq_accumulate`).
`tasks` and `scheduler` say what a program computes, `tile_masks` what it masks.

A step has five products of a tile of keys K, its values V, and a tile of queries Q with the
gradients dO of their outputs (`softmax` says what is between them)::

    logits = K Q'    dweights = V dO'    dV += weights dO    dK += dlogits Q    dQ = dlogits' K

dV and dK stay in registers until the program ends. dQ leaves it at each step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward import dkv_reduce, dq_postprocess
from pallas_kernels._mosaic_gpu.backward.launch import WARPGROUPS_APART, launch
from pallas_kernels._mosaic_gpu.backward.launch_schedule import backward_schedule
from pallas_kernels._mosaic_gpu.backward.producer import StepCopies, produce
from pallas_kernels._mosaic_gpu.backward.query_plans import (
    last_key_blocks,
    plan_of_launch,
    plan_with_first_block,
)
from pallas_kernels._mosaic_gpu.backward.scheduler import ProgramSchedule
from pallas_kernels._mosaic_gpu.backward.softmax import padded_lse_and_delta
from pallas_kernels._mosaic_gpu.backward.tasks import QUERY_TILE
from pallas_kernels._mosaic_gpu.backward.tile_masks import TileMasks
from pallas_kernels._mosaic_gpu.padding import padding_flags
from pallas_kernels._spec import KeyRun, Spec
from pallas_kernels._tile_ranges import seen_tiles

CONSUMERS = 2
"""Warpgroups that compute: the first ones."""


PRODUCER, DQ_ACCUMULATOR = CONSUMERS, CONSUMERS + 1
"""Numbers of the other two warpgroups."""


CONSUMER_REGISTERS, OTHER_REGISTERS = 232, 24
"""Of a thread. A multiprocessor has 512 for each thread of a warpgroup: 2 * 232 + 2 * 24."""


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
        self.masks = TileMasks(spec, self.schedule, query.shape[1], self.has_ends_by_row)
        plan = plan_of_launch(spec, queries, self.schedule, rows=rows)
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

    def program_schedule(self, refs: dict[str, Any]) -> ProgramSchedule:
        """The schedule of the program that asks."""
        index = lax.axis_index("program")
        bounds = refs.get("start"), refs.get("last_block")
        return ProgramSchedule(self.schedule, index, refs["plan"], *bounds)

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
            consume: ``consume(refs, smem, barriers, warpgroup)``, of the consumers.
            accumulate_dq: ``accumulate_dq(refs, smem, barriers)``, of the dq accumulator.
            copies: what the producer copies at each step.
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
                self._run_warpgroup(consume, accumulate_dq, copies, refs, smem, barriers)

            pl.run_scoped(body, smem, barriers, collective_axes="warpgroup")

        found = launch(
            ring_swa_backward_fused,
            operands,
            outputs | partial_sums,
            programs=self.schedule.programs,
            varies_as=self.query,
            compiler_params=WARPGROUPS_APART,
            warpgroups=CONSUMERS + 2,
        )
        if self.sums is not None:
            dquery = jax.freeze(operands["dquery_sums"])
        else:
            dquery = found["dquery_sums" if self.epilogue is None else "out"]
        return dquery, found["dkey"], found["dvalue"]

    def _run_warpgroup(
        self,
        consume: Callable[..., None],
        accumulate_dq: Callable[..., None],
        copies: Mapping[str, StepCopies],
        refs: dict[str, Any],
        smem: dict[str, Any],
        barriers: dict[str, Any],
    ) -> None:
        """What each warpgroup of a program does; arguments as of `launch`."""
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < CONSUMERS)
        def consumers():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            consume(refs, smem, barriers, warpgroup)

        @pl.when(warpgroup == PRODUCER)
        def producer():
            plgpu.set_max_registers(OTHER_REGISTERS, action="decrease")
            produce(self.program_schedule(refs), refs, smem, barriers, copies)

        @pl.when(warpgroup == DQ_ACCUMULATOR)
        def dq_accumulator():
            plgpu.set_max_registers(OTHER_REGISTERS, action="decrease")
            accumulate_dq(refs, smem, barriers)

    def _results(
        self, dkey_dtype: jnp.dtype
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, Any], dict[str, Any]]:
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
