"""What all programs of the kernel for sinks share: settings, arrays, shared memory, barriers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqPostprocess
from pallas_kernels._mosaic_gpu.backward.softmax import padded_lse_and_delta, staging_columns
from pallas_kernels._mosaic_gpu.padding import FLAG_WIDTH, padding_flags
from pallas_kernels._mosaic_gpu.primitives import ROWS, swizzled
from pallas_kernels._spec import Spec


@dataclasses.dataclass(frozen=True)
class SinkConfig:
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

    @property
    def step_arrays(self) -> tuple[str, ...]:
        """The arrays that are copied for each tile of queries."""
        bounds = ("start", "padding") if self.packed else ()
        return ("query", "dout", "shift", "delta", *bounds)

    def operands(
        self,
        queries: Queries,
        sinks: tuple[Float[Array, "B chunks K 64 H"], Float[Array, "B chunks K 64 Hv"]],
        starts: Int[Array, "B chunks"],
    ) -> dict[str, Any]:
        """The arrays that the kernel reads, by name."""
        query, dout, lse, delta, start, _ = queries
        operands = {
            **self.work.operands,
            "query": query,
            "dout": dout,
            **padded_lse_and_delta(self.spec, lse, delta, self.work.num_tiles * ROWS),
            "key": sinks[0],
            "value": sinks[1],
            "starts": starts,
        }
        if self.packed:
            operands["start"] = jnp.pad(start, ((0, 0), (0, -query.shape[1] % ROWS)), mode="edge")
            operands["padding"] = padding_flags(start)
        return operands

    def smem(self) -> dict[str, Any]:
        """Types of the buffers in shared memory."""
        dim, value_dim = self.columns["dkey"], self.columns["dvalue"]
        dtype, slice_columns = self.dtype, self.work.columns
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
        if self.packed:
            smem["start"] = plgpu.SMEM((ROWS,), jnp.int32)
            smem["padding"] = plgpu.SMEM((FLAG_WIDTH,), jnp.int32)
        return smem

    def barriers(self) -> dict[str, Any]:
        """Types of the barriers. Copies arrive, and the program's only warpgroup waits."""
        return {
            "key": plgpu.Barrier(num_arrivals=2),
            "query": plgpu.Barrier(num_arrivals=len(self.step_arrays)),
        }
