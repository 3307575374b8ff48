"""From the sums of the fused backward kernels to the gradients of queries (dq).

The sums are float32 and unscaled. They lie tile by tile (`ROWS` queries of a head), a tile in
slices of columns, each slice in the order of `register_tiles`. `DqPostprocess` is a kernel that
scales and rounds them; `DqEpilogue` is what it shares with a fused kernel that does so itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Float, Float32

from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.primitives import (
    MATRIX,
    ROWS,
    Index,
    load_as,
    opaque_to_compiler,
    swizzled,
    zeros,
)
from pallas_kernels._mosaic_gpu.ragged_copies import allow_any_length
from pallas_kernels._mosaic_gpu.register_tiles import WIDTH
from pallas_kernels._varying import vary_as


class DqSums(NamedTuple):
    """Sums of the gradients of queries, before the scale.

    Attributes:
        slices: each of shape `register_tiles.tile_shape`.
        seen: whether any key is seen from a tile of queries; if not, its slices are undefined.
    """

    slices: Float32[Array, "B N tiles slices slice_rows width"]
    seen: Bool[Array, "#B tiles"]

    @property
    def slice_columns(self) -> int:
        """Columns of a slice."""
        return self.slices.shape[4] * WIDTH // ROWS


def zero_sums(query: Float[Array, "B T N H"], *, rows: int, columns: int) -> DqSums:
    """Sums to which no launch has added, in slices of so many columns."""
    batch, _, heads, dim = query.shape
    tiles = pl.cdiv(rows, ROWS)
    shape = (batch, heads, tiles, dim // columns, *register_tiles.tile_shape(columns))
    return DqSums(jnp.zeros(shape, jnp.float32), jnp.ones((batch, tiles), bool))


class DqEpilogue:
    """Scales and rounds sums of the gradients of queries.

    Args:
        scale: factor of the sums.
        shape: (B, rows, N, H) of the result.
        columns: of a slice.
        dtype: of the result.
    """

    def __init__(self, *, scale: float, shape: tuple[int, ...], columns: int, dtype: jnp.dtype):
        self.scale, self.columns, self.dtype = scale, columns, dtype
        self.batch, self.rows, self.heads, self.dim = shape
        self.num_slices, self.num_tiles = self.dim // columns, pl.cdiv(self.rows, ROWS)
        self.out_type = jax.ShapeDtypeStruct(shape, dtype)

    def scale_and_round(self, sums: Float32[Array, "64 columns"]) -> Float[Array, "64 columns"]:
        """The result of a slice."""
        return (sums * self.scale).astype(self.dtype)

    def dst(
        self,
        refs: dict[str, Any],
        row: Index,
        tile: Index,
        head: Index,
        n: int,
    ) -> Any:
        """Where slice ``n`` of a tile belongs."""
        columns = pl.ds(n * self.columns, self.columns)
        return refs["out"].at[row, pl.ds(tile * ROWS, ROWS), head, columns]


class DqPostprocess(DqEpilogue):
    """The parts of a kernel that finishes the gradients of queries.

    Args:
        sums: from a fused kernel.
        others: gradients of the first queries through keys of other launches, or None.
        scale: factor of ``sums``.
        rows: how many queries there are.
        dtype: of the result.
    """

    def __init__(
        self,
        sums: DqSums,
        others: Float32[Array, "B R0 N H"] | None,
        *,
        scale: float,
        rows: int,
        dtype: jnp.dtype,
    ):
        batch, heads, _, slices = sums.slices.shape[:4]
        columns = sums.slice_columns
        shape = batch, rows, heads, slices * columns
        super().__init__(scale=scale, shape=shape, columns=columns, dtype=dtype)
        self.rows_of_seen = len(sums.seen)
        self.operands: dict[str, Array] = {
            "sums": sums.slices,
            "seen": sums.seen.astype(jnp.int32),
        }
        self.tiles_of_others = 0
        if others is not None:
            self.tiles_of_others = pl.cdiv(others.shape[1], ROWS)
            pad = self.tiles_of_others * ROWS - others.shape[1]
            self.operands["others"] = jnp.pad(others, ((0, 0), (0, pad), (0, 0), (0, 0)))
        self.smem = swizzled((slices, ROWS, columns), dtype)

    def load_sums(
        self,
        refs: dict[str, Any],
        row: Index,
        tile: Index,
        head: Index,
        n: int,
    ) -> Float32[Array, "64 columns"]:
        """Slice ``n`` of a tile of the sums."""
        seen = refs["seen"][row if self.rows_of_seen > 1 else 0, tile] > 0
        src = refs["sums"].at[row, head, tile, n]
        return lax.cond(
            seen, lambda: register_tiles.load(src, self.columns), lambda: zeros(self.columns)
        )

    def stage(
        self,
        refs: dict[str, Any],
        smem: Any,
        row: Index,
        tile: Index,
        head: Index,
        n: int,
        sums: Float32[Array, "64 columns"],
    ) -> None:
        """Leaves the result of a slice in shared memory."""
        smem.at[opaque_to_compiler(n)][...] = self._finished(refs, row, tile, head, n, sums)

    def _finished(
        self,
        refs: dict[str, Any],
        row: Index,
        tile: Index,
        head: Index,
        n: int,
        sums: Float32[Array, "64 columns"],
    ) -> Float[Array, "64 columns"]:
        """The result of a slice: scaled, with `others` added, and rounded."""
        result = sums * self.scale
        if self.tiles_of_others:
            first = jnp.minimum(tile, self.tiles_of_others - 1) * ROWS
            columns = pl.ds(n * self.columns, self.columns)
            src = refs["others"].at[row, pl.ds(first, ROWS), head, columns]
            result = lax.cond(
                tile < self.tiles_of_others,
                lambda x: x + load_as(src, MATRIX),
                lambda x: x,
                result,
            )
        return result.astype(self.dtype)

    def write_tile(
        self,
        refs: dict[str, Any],
        smem: Any,
        row: Index,
        tile: Index,
        head: Index,
    ) -> None:
        """Copies all slices of a tile from shared memory, once all warps have staged them."""
        plgpu.commit_smem()
        for n in range(self.num_slices):
            plgpu.copy_smem_to_gmem(smem.at[n], self.dst(refs, row, tile, head, n))


def postprocess(
    sums: DqSums,
    others: Float32[Array, "B R0 N H"] | None,
    *,
    scale: float,
    rows: int,
    dtype: jnp.dtype,
) -> Float[Array, "B R N H"]:
    """The gradients of queries; arguments as those of `DqPostprocess`."""
    work = DqPostprocess(sums, others, scale=scale, rows=rows, dtype=dtype)

    def ring_swa_backward_finish(*refs):
        allow_any_length()
        inputs = dict(zip((*work.operands, "out"), refs, strict=True))

        def body(smem):
            index = lax.axis_index("program")
            head = lax.rem(index, jnp.int32(work.heads))
            index = lax.div(index, jnp.int32(work.heads))
            tile = lax.rem(index, jnp.int32(work.num_tiles))
            row = lax.div(index, jnp.int32(work.num_tiles))
            # All loads are issued before the first result is needed.
            loaded = [work.load_sums(inputs, row, tile, head, n) for n in range(work.num_slices)]
            for n, x in enumerate(loaded):
                work.stage(inputs, smem, row, tile, head, n, x)
            work.write_tile(inputs, smem, row, tile, head)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(body, work.smem)

    (out,) = plgpu.kernel(
        ring_swa_backward_finish,
        out_type=(work.out_type,),
        grid=(work.batch * work.num_tiles * work.heads,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*work.operands.values())
    return vary_as(sums.slices, out)
