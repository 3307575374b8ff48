"""Kernel in Mosaic GPU, for Hopper, of the gradients through sinks that windows do not reach.

It runs after a fused kernel and finishes the gradients of queries, of which it reads and writes
every tile anyway (`dq_postprocess.DqPostprocess`). A program has one query head and a chunk of the
queries. A chunk is no longer than a window, so all of its queries that see sinks beyond their
windows are of one sequence: that of the chunk's first query. So a program has one tile of sinks.
What its queries add to the gradients of these sinks it keeps in registers, and writes in float32;
`sinks` adds that up over chunks.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Float32, Int

from pallas_kernels._kernels import Queries
from pallas_kernels._masks import sees_beyond_window
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqPostprocess, DqSums
from pallas_kernels._mosaic_gpu.backward.launch import launch
from pallas_kernels._mosaic_gpu.backward.softmax import (
    initial_logits,
    padded_lse_and_delta,
    softmax_backward,
    staging_columns,
    write_through_smem,
)
from pallas_kernels._mosaic_gpu.padding import FLAG_WIDTH, padding_flags, zero_padding
from pallas_kernels._mosaic_gpu.primitives import (
    MATRIX,
    ROW,
    ROWS,
    broadcast_row,
    fori,
    load_as,
    opaque_to_compiler,
    swizzled,
    zeros,
)
from pallas_kernels._spec import Spec

MAX_CHUNK = 512
"""Queries of a chunk at most: enough programs for a GPU, and few partial sums."""


MAX_COLUMNS = 256
"""H + Hv up to which a program computes the gradients of keys and values at once. Registers do not
hold more; it then goes through its queries twice."""


def chunk_length(window: int) -> int:
    """Queries of a chunk: whole tiles, no longer than ``window`` and a query's own key."""
    return min(MAX_CHUNK, (window + 1) // ROWS * ROWS)


def backward_by_chunks(
    spec: Spec,
    queries: Queries,
    sinks: tuple[Float[Array, "B chunks K 64 H"], Float[Array, "B chunks K 64 Hv"]],
    starts: Int[Array, "B chunks"],
    sums: DqSums,
    others: Float32[Array, "B R0 N H"] | None,
    dquery_dtype: jnp.dtype,
    *,
    fetched: bool,
) -> tuple[
    Float[Array, "B T N H"],
    Float32[Array, "B chunks N sinks H"],
    Float32[Array, "B chunks N sinks Hv"],
]:
    """Finishes the gradients of queries; gradients of sinks by chunks and query heads.

    Args:
        spec: static settings.
        queries: queries of the shard, and what belongs to them.
        sinks: keys and values of the sinks of each chunk's sequence.
        starts: where this sequence starts.
        sums: gradients of queries through the keys in their windows.
        others: gradients of the first queries through keys of other launches, or None.
        dquery_dtype: of the gradients of queries.
        fetched: whether ``sinks`` holds those that stand before the shard.
    """
    assert spec.window is not None
    query = queries.query
    length, (num_kv_heads, _, dim), value_dim = (
        query.shape[1],
        sinks[0].shape[2:],
        sinks[1].shape[4],
    )
    work = DqPostprocess(sums, others, scale=spec.scale, rows=length, dtype=dquery_dtype)
    settings = _Settings(
        spec=spec,
        work=work,
        group_size=work.heads // num_kv_heads,
        num_chunks=starts.shape[1],
        chunk_tiles=chunk_length(spec.window) // ROWS,
        packed=queries.start.ndim > 0,
        fetched=fetched,
        dtype=query.dtype,
        columns={"dkey": dim, "dvalue": value_dim},
    )
    parts = work.batch, settings.num_chunks, work.heads, settings.written_rows
    outputs = {
        "out": work.out_type,
        "dkey": jax.ShapeDtypeStruct((*parts, dim), jnp.float32),
        "dvalue": jax.ShapeDtypeStruct((*parts, value_dim), jnp.float32),
    }

    def ring_swa_backward_sinks(refs):
        def body(*memory):
            _Program(settings, refs, *memory).run()

        pl.run_scoped(body, _smem(settings), work.smem, _barriers(settings))

    results = launch(
        ring_swa_backward_sinks,
        _operands(settings, queries, sinks, starts),
        outputs,
        programs=work.batch * settings.num_chunks * work.heads,
        varies_as=query,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return results["out"], results["dkey"], results["dvalue"]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What all programs have in common.

    Attributes:
        spec: static settings.
        work: what finishes the gradients of queries.
        group_size: query heads of a head of keys.
        num_chunks: chunks of the sequence.
        chunk_tiles: tiles of queries of a chunk.
        packed: whether there are documents.
        fetched: whether there are sinks before the shard.
        dtype: of queries, keys and values.
        columns: those of "dkey" and of "dvalue".
    """

    spec: Spec
    work: DqPostprocess
    group_size: int
    num_chunks: int
    chunk_tiles: int
    packed: bool
    fetched: bool
    dtype: jnp.dtype
    columns: dict[str, int]

    @property
    def written_rows(self) -> int:
        """Rows of the gradients of sinks that are written: TMA counts rows by 8."""
        return pl.cdiv(self.spec.num_sinks, 8) * 8


def _operands(
    settings: _Settings,
    queries: Queries,
    sinks: tuple[Float[Array, "B chunks K 64 H"], Float[Array, "B chunks K 64 Hv"]],
    starts: Int[Array, "B chunks"],
) -> dict[str, Any]:
    """The arrays that the kernel reads, by name."""
    query, dout, lse, delta, start, _ = queries
    operands = {
        **settings.work.operands,
        "query": query,
        "dout": dout,
        **padded_lse_and_delta(settings.spec, lse, delta, settings.work.num_tiles * ROWS),
        "key": sinks[0],
        "value": sinks[1],
        "starts": starts,
    }
    if settings.packed:
        operands["start"] = jnp.pad(start, ((0, 0), (0, -query.shape[1] % ROWS)), mode="edge")
        operands["padding"] = padding_flags(start)
    return operands


def _smem(settings: _Settings) -> dict[str, Any]:
    """Types of the buffers in shared memory."""
    dim, value_dim = settings.columns["dkey"], settings.columns["dvalue"]
    dtype, slice_columns = settings.dtype, settings.work.columns
    smem = {
        "key": swizzled((ROWS, dim), dtype, columns=slice_columns),
        "value": swizzled((ROWS, value_dim), dtype),
        "query": swizzled((ROWS, dim), dtype, columns=slice_columns),
        "dout": swizzled((ROWS, value_dim), dtype),
        "shift": plgpu.SMEM((ROWS,), jnp.float32),
        "delta": plgpu.SMEM((ROWS,), jnp.float32),
        "dlogits": swizzled((1, ROWS, ROWS), dtype, columns=slice_columns),
        # The staging buffer for the gradients of sinks.
        "out": plgpu.SMEM((ROWS, staging_columns(jnp.float32, dim, value_dim)), jnp.float32),
    }
    if settings.packed:
        smem["start"] = plgpu.SMEM((ROWS,), jnp.int32)
        smem["padding"] = plgpu.SMEM((FLAG_WIDTH,), jnp.int32)
    return smem


def _barriers(settings: _Settings) -> dict[str, Any]:
    """Types of the barriers. Copies arrive, and the program's only warpgroup waits."""
    return {
        "key": plgpu.Barrier(num_arrivals=2),
        "query": plgpu.Barrier(num_arrivals=6 if settings.packed else 4),
    }


class _Program:
    """A program, which is one warpgroup.

    Args:
        settings: what all programs have in common.
        refs: arrays in global memory.
        smem: buffers of `_smem`.
        dquery_smem: that of `DqPostprocess`.
        barriers: those of `_barriers`.
    """

    def __init__(
        self,
        settings: _Settings,
        refs: dict[str, Any],
        smem: dict[str, Any],
        dquery_smem: Any,
        barriers: dict[str, Any],
    ):
        self.settings, self.spec, self.work = settings, settings.spec, settings.work
        self.refs, self.smem, self.barriers = refs, smem, barriers
        self.dquery_smem = dquery_smem
        index, heads = lax.axis_index("program"), jnp.int32(self.work.heads)
        num_chunks = jnp.int32(settings.num_chunks)
        self.head = lax.rem(index, heads)
        index = lax.div(index, heads)
        self.chunk, self.row = lax.rem(index, num_chunks), lax.div(index, num_chunks)
        self.begin = self.chunk * settings.chunk_tiles
        end = self.chunk * settings.chunk_tiles + settings.chunk_tiles
        self.end = jnp.minimum(end, self.work.num_tiles)
        self.first_sink = refs["starts"][self.row, self.chunk]

    def run(self) -> None:
        """Computes the chunk."""
        for name in ("key", "value"):
            kv_head = lax.div(self.head, jnp.int32(self.settings.group_size))
            src = self.refs[name].at[self.row, self.chunk, kv_head]
            plgpu.copy_gmem_to_smem(src, self.smem[name], self.barriers["key"])
        plgpu.barrier_wait(self.barriers["key"])

        # The first tile whose last query may see a sink beyond its window.
        assert self.spec.window is not None
        first_query = self.first_sink + self.spec.window + 1
        first_tile = lax.div(jnp.maximum(first_query, 0), jnp.int32(ROWS))
        first_tile = jnp.clip(first_tile, self.begin, self.end)
        if sum(self.settings.columns.values()) <= MAX_COLUMNS:
            self._pass_over_queries(("dkey", "dvalue"), first_tile)
        else:
            self._pass_over_queries(("dkey",), first_tile)
            self._pass_over_queries(("dvalue",), first_tile)
        plgpu.wait_smem_to_gmem(0)

    def _pass_over_queries(self, names: tuple[str, ...], first_tile: Int[Array, ""]) -> None:
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
        initial = tuple(zeros(self.settings.columns[name]) for name in names)
        sums = fori(first_tile, self.end, step, initial)
        for name, result in zip(names, sums, strict=True):
            self._write(name, result)

    def _copy(self, tile: Int[Array, ""]) -> None:
        """Copies a tile of queries to shared memory."""
        rows, arrived = pl.ds(tile * ROWS, ROWS), self.barriers["query"]
        for name in ("query", "dout"):
            src = self.refs[name].at[self.row, rows, self.head]
            plgpu.copy_gmem_to_smem(src, self.smem[name], arrived)
        for name in ("shift", "delta"):
            src = self.refs[name].at[self.row, self.head, rows]
            plgpu.copy_gmem_to_smem(src, self.smem[name], arrived)
        if self.settings.packed:
            src = self.refs["start"].at[self.row, rows]
            plgpu.copy_gmem_to_smem(src, self.smem["start"], arrived)
            src = self.refs["padding"].at[self.row, tile]
            plgpu.copy_gmem_to_smem(src, self.smem["padding"], arrived)

    def _add_tile(
        self,
        names: tuple[str, ...],
        tile: Int[Array, ""],
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
                self.settings.dtype,
            )
            if "dvalue" in names:
                plgpu.wgmma(named["dvalue"], weights, smem["dout"])
            if "dkey" in names:
                plgpu.wgmma(named["dkey"], dlogits, smem["query"])
                smem["dlogits"].at[opaque_to_compiler(0)][...] = dlogits
            plgpu.wgmma_wait(0)

        initial = *sums, initial_logits(spec, shift), minus_delta
        return pl.run_state(multiply)(tuple(map(plgpu.ACC.init, initial)))[:-2]

    def _zero_padding(self, tile: Int[Array, ""]) -> None:
        """Zeros in the padding of a tile of queries."""
        if not self.settings.packed:
            return
        smem = self.smem

        @pl.when(smem["padding"][0] != 0)
        def write():
            zero_padding([smem["query"], smem["dout"]], smem["start"], tile * ROWS)

    def _mask(
        self, tile: Int[Array, ""], weights: Float32[Array, "64 64"]
    ) -> Float32[Array, "64 64"]:
        """Weights, zero where a query does not see a key as a sink beyond its window."""
        j = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=MATRIX)
        i = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1, layout=MATRIX)
        i, j = i * opaque_to_compiler(1) + tile * ROWS, j + self.first_sink
        starts = self.first_sink
        if self.settings.packed:
            starts = broadcast_row(load_as(self.smem["start"], ROW))
        spec = self.spec
        seen = sees_beyond_window(i, j, starts, spec.window, spec.num_sinks)
        if not self.settings.fetched:
            seen &= j >= 0
        return jnp.where(seen, weights, 0.0)

    def _finish_dquery(self, tile: Int[Array, ""], *, through_sinks: bool) -> None:
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
        rows = self.settings.written_rows

        def dst(column, columns):
            return self.refs[name].at[
                self.row, self.chunk, self.head, pl.ds(0, rows), pl.ds(column, columns)
            ]

        factor = self.spec.scale if name == "dkey" else 1.0
        write_through_smem(sums * factor, self.smem["out"], dst, rows=rows)
