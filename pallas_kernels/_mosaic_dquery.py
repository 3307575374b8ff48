"""Gradients of queries as the fused backward kernels add them up, and what makes them an array.

They are float32, tile by tile of `ROWS` queries of a head, in the order in which the registers of
the threads have them: so shared memory takes 16 bytes of each thread at once, without conflicts,
and TMA adds one block of memory to another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import _mosaic_blocks
from pallas_kernels._mosaic_blocks import MATRIX, ROWS, fresh, swizzled
from pallas_kernels._mosaic_gradients import zeros
from pallas_kernels._spec import vary_as

_VECTOR = 4
_WIDTH = 256
"""The most numbers in a row that TMA copies."""


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
        return self.parts.shape[4] * _WIDTH // ROWS


def tile_shape(columns: int) -> tuple[int, int]:
    """The shape of what `store` makes of a matrix of so many columns, a multiple of 8."""
    return ROWS * columns // _WIDTH, _WIDTH


def store(ref: Any, x: Array) -> None:
    """Stores a matrix as it lies in registers."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), MATRIX))
    def put(_, ref, x):
        pairs = list(x.registers.flat)
        for place, first, second in zip(_places(len(pairs)), pairs[::2], pairs[1::2], strict=True):
            vector.store(vector.shuffle(first, second, list(range(_VECTOR))), ref, place)

    put(ref, x)


def load(ref: Any, columns: int) -> Array:
    """The matrix that `store` has stored."""
    result = plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def take(_, ref):
        layout = MATRIX.to_mgpu()
        shape = layout.registers_shape((ROWS, columns))
        kind = ir.VectorType.get((_VECTOR,), ir.F32Type.get())
        pairs = []
        for place in _places(int(np.prod(shape))):
            four = vector.load(kind, ref, place)
            pairs += [vector.shuffle(four, four, [n, n + 1]) for n in (0, 2)]
        registers = np.empty(len(pairs), object)
        registers[:] = pairs
        return FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return take(ref)


def _places(pairs: int):
    """Where each four numbers of a thread stand."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()

    def number(n):
        return utils.c(n, i32)

    thread = arith.remui(utils.thread_idx(), number(utils.WARPGROUP_SIZE))
    row_of_threads = _WIDTH // _VECTOR
    row = arith.index_cast(index, arith.divui(thread, number(row_of_threads)))
    column = arith.muli(arith.remui(thread, number(row_of_threads)), number(_VECTOR))
    column = arith.index_cast(index, column)
    for n in range(0, pairs, 2):
        rows_before = utils.c(n // 2 * utils.WARPGROUP_SIZE // row_of_threads, index)
        yield [arith.addi(row, rows_before), column]


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
        return lax.cond(used, lambda: load(found, self.columns), lambda: zeros(self.columns))

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
                lambda x: x + _mosaic_blocks.load(here, MATRIX),
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
