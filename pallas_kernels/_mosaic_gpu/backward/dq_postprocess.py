"""Gradients of queries as the fused backward kernels add them up, and what makes them an array.

They are float32, tile by tile of `ROWS` queries of a head, in the order in which the registers of
the threads have them: so shared memory takes 16 bytes of each thread at once, without conflicts,
and TMA adds one block of memory to another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._mosaic_gpu import primitives, register_tiles
from pallas_kernels._mosaic_gpu.primitives import MATRIX, ROWS, fresh, swizzled, zeros
from pallas_kernels._mosaic_gpu.register_tiles import WIDTH
from pallas_kernels._varying import vary_as


class Total(NamedTuple):
    """Gradients of queries added up, before the scale.

    ``parts`` are [B, N, tiles, parts of columns, `tile_shape`]; ``seen`` [B or 1, tiles] says
    whether there is anything in them.
    """

    parts: Array
    seen: Array

    @property
    def part_columns(self) -> int:
        """Columns of a part."""
        return self.parts.shape[4] * WIDTH // ROWS


class Rounding:
    """What becomes of added up gradients of queries: ``scale`` times them, rounded.

    Args:
        scale: factor of what has been added up.
        shape: (B, rows, N, H) of the result.
        columns: of a part.
        dtype: of the result.
    """

    def __init__(self, *, scale: float, shape: tuple[int, ...], columns: int, dtype: jnp.dtype):
        self.scale, self.columns, self.dtype = scale, columns, dtype
        self.batch, self.rows, self.heads, self.dim = shape
        self.parts, self.tiles = self.dim // columns, -(-self.rows // ROWS)
        stored = self.rows if self.rows % 8 == 0 else self.tiles * ROWS
        self.out_type = jax.ShapeDtypeStruct((self.batch, stored, self.heads, self.dim), dtype)

    def result(self, total: Array) -> Array:
        """A part of a tile, of what has been added up."""
        return (total * self.scale).astype(self.dtype)

    def whole(self, out: Array) -> Array:
        """The result, of what is stored: TMA counts rows by 8."""
        return out[:, : self.rows]

    def there(self, refs: dict[str, Any], row, tile, head, part: int) -> Any:
        """Where a part belongs."""
        columns = pl.ds(part * self.columns, self.columns)
        return refs["out"].at[row, pl.ds(tile * ROWS, ROWS), head, columns]


class Finish(Rounding):
    """Rounding of a `Total`, in a kernel of its own, with ``more`` added.

    Args:
        total: what has been added up.
        more: gradients of the first queries, [B, at most rows, N, H] in float32, or None.
        scale: as for `Rounding`.
        rows: how many queries there are.
        dtype: of the result.
    """

    def __init__(
        self, total: Total, more: Array | None, *, scale: float, rows: int, dtype: jnp.dtype
    ):
        batch, heads, _, parts = total.parts.shape[:4]
        columns = total.part_columns
        shape = batch, rows, heads, parts * columns
        super().__init__(scale=scale, shape=shape, columns=columns, dtype=dtype)
        self.rows_of_seen = len(total.seen)
        self.operands: dict[str, Array] = {
            "total": total.parts,
            "seen": total.seen.astype(jnp.int32),
        }
        self.near = 0
        if more is not None:
            self.near = -(-more.shape[1] // ROWS)
            pad = self.near * ROWS - more.shape[1]
            self.operands["more"] = jnp.pad(more, ((0, 0), (0, pad), (0, 0), (0, 0)))
        self.smem = swizzled((parts, ROWS, columns), dtype)

    def load(self, refs: dict[str, Any], row, tile, head, part: int) -> Array:
        """A part of a tile of the total."""
        used = refs["seen"][row if self.rows_of_seen > 1 else 0, tile] > 0
        found = refs["total"].at[row, head, tile, part]
        return lax.cond(
            used, lambda: register_tiles.load(found, self.columns), lambda: zeros(self.columns)
        )

    def put(self, refs: dict[str, Any], smem, row, tile, head, part: int, total: Array):
        """A part's result into shared memory."""
        smem.at[fresh(part)][...] = self.with_more(refs, row, tile, head, part, total)

    def with_more(self, refs: dict[str, Any], row, tile, head, part, total: Array) -> Array:
        """The result of a part of a tile."""
        result = total * self.scale
        if self.near:
            nearest = jnp.minimum(tile, self.near - 1) * ROWS
            columns = pl.ds(part * self.columns, self.columns)
            here = refs["more"].at[row, pl.ds(nearest, ROWS), head, columns]
            result = lax.cond(
                tile < self.near,
                lambda x: x + primitives.load(here, MATRIX),
                lambda x: x,
                result,
            )
        return result.astype(self.dtype)

    def send(self, refs: dict[str, Any], smem, row, tile, head):
        """Writes all parts of a tile, after all warps have put them."""
        plgpu.commit_smem()
        for part in range(self.parts):
            plgpu.copy_smem_to_gmem(smem.at[part], self.there(refs, row, tile, head, part))


def finish(total: Total, more: Array | None, *, scale: float, rows: int, dtype: jnp.dtype) -> Array:
    """The gradients of queries as an array, [B, rows, N, H]; arguments as those of `Finish`."""
    work = Finish(total, more, scale=scale, rows=rows, dtype=dtype)

    def ring_swa_backward_finish(*refs):
        inputs = dict(zip((*work.operands, "out"), refs, strict=True))

        def body(smem):
            index = lax.axis_index("program")
            head = lax.rem(index, jnp.int32(work.heads))
            index = lax.div(index, jnp.int32(work.heads))
            tile = lax.rem(index, jnp.int32(work.tiles))
            row = lax.div(index, jnp.int32(work.tiles))
            here = inputs, smem, row, tile, head
            parts = [work.load(inputs, row, tile, head, part) for part in range(work.parts)]
            for part, result in enumerate(parts):
                work.put(*here, part, result)
            work.send(*here)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(body, work.smem)

    (out,) = plgpu.kernel(
        ring_swa_backward_finish,
        out_type=(work.out_type,),
        grid=(work.batch * work.tiles * work.heads,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*work.operands.values())
    # Kernels of Mosaic GPU know nothing of manual mesh axes.
    return vary_as(total.parts, work.whole(out))
