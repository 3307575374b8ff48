"""A program of the kernel for sinks that windows do not reach: a query head and a chunk of queries.

It is one warpgroup. It goes through the chunk's tiles of queries, computes what flows through the
chunk's one tile of sinks, finishes the gradients of the queries, and keeps those of the sinks in
registers until the end.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float32

from pallas_kernels._masks import sees_beyond_window
from pallas_kernels._mosaic_gpu.backward.sinks_config import SinkConfig
from pallas_kernels._mosaic_gpu.backward.softmax import (
    initial_logits,
    softmax_backward,
    write_through_smem,
)
from pallas_kernels._mosaic_gpu.padding import zero_padding
from pallas_kernels._mosaic_gpu.primitives import (
    MATRIX,
    ROW,
    ROWS,
    Index,
    broadcast_row,
    fori,
    load_as,
    opaque_to_compiler,
    zeros,
)

MAX_COLUMNS = 256
"""H + Hv up to which a program computes the gradients of keys and values at once. Registers do not
hold more; it then goes through its queries twice."""


class SinkProgram:
    """A program, which is one warpgroup.

    Args:
        config: what all programs have in common.
        refs: arrays in global memory.
        smem: the buffers of `sinks_kernel`.
        dquery_smem: that of `DqPostprocess`.
        barriers: its barriers.
    """

    def __init__(
        self,
        config: SinkConfig,
        refs: dict[str, Any],
        smem: dict[str, Any],
        dquery_smem: Any,
        barriers: dict[str, Any],
    ):
        self.config, self.spec, self.work = config, config.spec, config.work
        self.refs, self.smem, self.barriers = refs, smem, barriers
        self.dquery_smem = dquery_smem
        index, heads = lax.axis_index("program"), jnp.int32(self.work.heads)
        num_chunks = jnp.int32(config.num_chunks)
        self.head = lax.rem(index, heads)
        index = lax.div(index, heads)
        self.chunk, self.row = lax.rem(index, num_chunks), lax.div(index, num_chunks)
        self.begin = self.chunk * config.chunk_tiles
        end = self.chunk * config.chunk_tiles + config.chunk_tiles
        self.end = jnp.minimum(end, self.work.num_tiles)
        self.first_sink = refs["starts"][self.row, self.chunk]

    def run(self) -> None:
        """Computes the chunk."""
        for name in ("key", "value"):
            kv_head = lax.div(self.head, jnp.int32(self.config.group_size))
            src = self.refs[name].at[self.row, self.chunk, kv_head]
            plgpu.copy_gmem_to_smem(src, self.smem[name], self.barriers["key"])
        plgpu.barrier_wait(self.barriers["key"])

        # The first tile whose last query may see a sink beyond its window.
        assert self.spec.window is not None
        first_query = self.first_sink + self.spec.window + 1
        first_tile = lax.div(jnp.maximum(first_query, 0), jnp.int32(ROWS))
        first_tile = jnp.clip(first_tile, self.begin, self.end)
        if sum(self.config.columns.values()) <= MAX_COLUMNS:
            self._pass_over_queries(("dkey", "dvalue"), first_tile)
        else:
            self._pass_over_queries(("dkey",), first_tile)
            self._pass_over_queries(("dvalue",), first_tile)
        plgpu.wait_smem_to_gmem(0)

    def _pass_over_queries(self, names: tuple[str, ...], first_tile: Index) -> None:
        """Computes "dkey", "dvalue" or both. The pass with "dkey" finishes dquery.

        ``first_tile`` is the first one that may see sinks beyond windows.
        """

        def step(tile, sums):
            sums = self._add_tile(names, tile, sums)
            # Both branches wait for all warps, which have then read this tile's shared memory. So
            # the next tile may be copied.
            if "dkey" in names:
                self._finish_dquery(tile, through_sinks=True)
            else:
                plgpu.commit_smem()

            @pl.when(tile + 1 < self.end)
            def copy_next():
                self._copy(tile + 1)

            return sums

        pl.when(first_tile < self.end)(lambda: self._copy(first_tile))
        if "dkey" in names:
            fori(
                self.begin,
                first_tile,
                lambda tile, _: self._finish_dquery(tile, through_sinks=False),
                None,
            )
        initial = tuple(zeros(self.config.columns[name]) for name in names)
        sums = fori(first_tile, self.end, step, initial)
        for name, result in zip(names, sums, strict=True):
            self._write(name, result)

    def _copy(self, tile: Index) -> None:
        """Copies a tile of queries to shared memory."""
        rows, arrived = pl.ds(tile * ROWS, ROWS), self.barriers["query"]
        indices: dict[str, Any] = {
            "query": (self.row, rows, self.head),
            "dout": (self.row, rows, self.head),
            "shift": (self.row, self.head, rows),
            "delta": (self.row, self.head, rows),
            "start": (self.row, rows),
            "padding": (self.row, tile),
        }
        for name in self.config.step_arrays:
            plgpu.copy_gmem_to_smem(self.refs[name].at[indices[name]], self.smem[name], arrived)

    def _add_tile(
        self,
        names: tuple[str, ...],
        tile: Index,
        sums: tuple[Float32[Array, "64 _"], ...],
    ) -> tuple[Float32[Array, "64 _"], ...]:
        """Adds what flows through a tile of queries; leaves dlogits in shared memory."""
        spec, smem = self.spec, self.smem
        plgpu.barrier_wait(self.barriers["query"])
        self._zero_padding(tile)
        shift = broadcast_row(load_as(smem["shift"], ROW))
        minus_delta = broadcast_row(load_as(smem["delta"], ROW))

        def multiply(accumulators):
            *sums, logits, dweights = accumulators
            named = dict(zip(names, sums, strict=True))
            plgpu.wgmma(logits, smem["key"], smem["query"].T)
            plgpu.wgmma(dweights, smem["value"], smem["dout"].T)
            weights, dlogits = softmax_backward(
                spec,
                logits,
                dweights,
                shift,
                jnp.bool_(False),
                partial(self._mask, tile),
                self.config.dtype,
            )
            if "dvalue" in names:
                plgpu.wgmma(named["dvalue"], weights, smem["dout"])
            if "dkey" in names:
                plgpu.wgmma(named["dkey"], dlogits, smem["query"])
                smem["dlogits"].at[opaque_to_compiler(0)][...] = dlogits
            plgpu.wgmma_wait(0)

        initial = *sums, initial_logits(spec, shift), minus_delta
        return pl.run_state(multiply)(tuple(map(plgpu.ACC.init, initial)))[:-2]

    def _zero_padding(self, tile: Index) -> None:
        """Zeros in the padding of a tile of queries."""
        if not self.config.packed:
            return
        smem = self.smem

        @pl.when(smem["padding"][0] != 0)
        def write():
            zero_padding([smem["query"], smem["dout"]], smem["start"], tile * ROWS)

    def _mask(self, tile: Index, weights: Float32[Array, "64 64"]) -> Float32[Array, "64 64"]:
        """Weights, zero where a query does not see a key as a sink beyond its window."""
        j = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=MATRIX)
        i = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1, layout=MATRIX)
        i, j = i * opaque_to_compiler(1) + tile * ROWS, j + self.first_sink
        starts = self.first_sink
        if self.config.packed:
            starts = broadcast_row(load_as(self.smem["start"], ROW))
        spec = self.spec
        seen = sees_beyond_window(i, j, starts, spec.window, spec.num_sinks)
        if not self.config.fetched:
            seen &= j >= 0
        return jnp.where(seen, weights, 0.0)

    def _finish_dquery(self, tile: Index, *, through_sinks: bool) -> None:
        """Finishes the gradients of a tile of queries, with what flows through sinks if asked."""
        work = self.work
        plgpu.commit_smem()  # makes dlogits visible to WGMMA
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        position = self.row, tile, self.head
        for n in range(work.num_slices):
            sums = work.load_sums(self.refs, *position, n)
            if through_sinks:
                multiply = partial(self._multiply_dlogits, n)
                sums = pl.run_state(multiply)(plgpu.ACC.init(sums))
            work.stage(self.refs, self.dquery_smem, *position, n, sums)
        work.write_tile(self.refs, self.dquery_smem, *position)

    def _multiply_dlogits(self, n: int, sums: Any) -> None:
        """Adds the product of the gradients of logits and the keys to slice ``n`` of dquery."""
        columns = pl.ds(n * self.work.columns, self.work.columns)
        plgpu.wgmma(sums, self.smem["dlogits"].at[0].T, self.smem["key"].at[:, columns])
        plgpu.wgmma_wait(0)

    def _write(self, name: str, sums: Float32[Array, "64 columns"]) -> None:
        """Writes the gradients of the sinks' keys or values."""
        rows = self.config.written_rows

        def dst(column, columns):
            return self.refs[name].at[
                self.row, self.chunk, self.head, pl.ds(0, rows), pl.ds(column, columns)
            ]

        factor = self.spec.scale if name == "dkey" else 1.0
        write_through_smem(sums * factor, self.smem["out"], dst, rows=rows)
