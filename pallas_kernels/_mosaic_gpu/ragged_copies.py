"""TMA copies of arrays whose length is no multiple of 8.

Shared memory holds a matrix in blocks of 8 rows, as WGMMA reads it. Pallas describes the array in
global memory to TMA by such blocks too, and refuses a length that they do not divide: TMA knows the
number of blocks, so it would also copy the rows behind the last one, which belong to the next row
of the batch. Described by rows, TMA leaves out what is behind the array; but then a copy is one
block, or as many as lie one behind the other in shared memory. So most tiles are copied by whole
blocks, and a tile that reaches beyond the last whole block is copied block by block.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.launch_context import Rounding
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf

BLOCK = 8
"""Rows of a block."""


IF: Any = scf.IfOp
"""Without a type, as that of jax 0.10 has no branches."""


def allow_any_length() -> None:
    """Lets all copies of a kernel take arrays of any length; to be called where the kernel begins.

    TMA reads zeros behind the last row of an array, and writes nothing there.
    """

    @plgpu.inline_mgpu(arg_types=())
    def replace_async_copy(ctx):
        # Pallas lowers each copy to a call of this method.
        ctx.async_copy = partial(_async_copy, ctx.async_copy)

    replace_async_copy()


def _async_copy(
    copy: Callable[..., None],
    *,
    src_ref: ir.Value,
    dst_ref: ir.Value,
    gmem_slice: Any = (),
    gmem_transform: Any = (),
    arrive: bool,
    **options: Any,
) -> None:
    """``copy``, which is ``LaunchContext.async_copy``, for arrays of any length."""
    to_smem = utils.is_smem_ref(dst_ref)
    gmem_ref, smem_ref = (src_ref, dst_ref) if to_smem else (dst_ref, src_ref)
    array = _Slice.of(gmem_ref, gmem_slice)
    if not gmem_transform or array.length % BLOCK == 0:
        refs = {"src_ref": src_ref, "dst_ref": dst_ref}
        slices = {"gmem_slice": gmem_slice, "gmem_transform": gmem_transform}
        copy(**refs, **slices, arrive=arrive, **options)
        return
    assert not (to_smem and arrive), "Pallas itself arrives at the barrier"

    def copy_rows(begin: ir.Value, rows: int, smem: ir.Value, *transform: Any) -> None:
        copy(
            src_ref=gmem_ref if to_smem else smem,
            dst_ref=smem if to_smem else gmem_ref,
            gmem_slice=array.with_rows(begin, rows),
            gmem_transform=transform,
            arrive=False,
            **options,
        )

    (tile,) = gmem_transform
    _copy_tile(copy_rows, array, tile, smem_ref)
    if arrive:
        nvvm.cp_async_bulk_commit_group()


def _copy_tile(
    copy_rows: Callable[..., None],
    array: "_Slice",
    tile: mgpu.TileTransform,
    smem_ref: ir.Value,
) -> None:
    """Copies a slice of an array from or to a tile in shared memory.

    Args:
        copy_rows: copies so many rows of the array from one on, and a part of the tile, by
            transforms of the array.
        array: the slice.
        tile: what divides an array into blocks as those of the tile.
        smem_ref: the tile.
    """

    def copy_block(n: int | ir.Value, begin: ir.Value) -> None:
        by_rows = mgpu.TileTransform(tile.tiling[1:]), mgpu.TransposeTransform((1, 0, 2))
        copy_rows(begin, BLOCK, utils.memref_slice(smem_ref, n), *by_rows)

    begin, rows, index = array.begin, array.rows, ir.IndexType.get()
    if (as_rows := _as_rows(smem_ref)) is not None:
        copy_rows(begin, rows, as_rows)
        return
    if rows == BLOCK:
        copy_block(0, begin)
        return
    end = arith.addi(begin, utils.c(rows, index))
    whole_blocks = utils.c(array.length // BLOCK * BLOCK, index)
    inside = arith.cmpi(arith.CmpIPredicate.ule, end, whole_blocks)
    branches = IF(inside, has_else=True)
    with ir.InsertionPoint(branches.then_block):
        copy_rows(begin, rows, smem_ref, dataclasses.replace(tile, rounding=Rounding.DOWN))
        scf.yield_([])
    with ir.InsertionPoint(branches.else_block):

        @utils.fori(utils.c(rows // BLOCK, index), ())
        def _(n, _):
            copy_block(n, arith.addi(begin, arith.muli(n, utils.c(BLOCK, index))))
            return ()

        scf.yield_([])


class _Slice(NamedTuple):
    """A matrix in an array, or a vector, and where its rows are.

    Attributes:
        begins: first index of each axis of the array.
        sizes: how many indices.
        squeezed: whether the matrix is without this axis.
        axis: that of the rows.
        length: of this axis in the array.
    """

    begins: list[ir.Value | int]
    sizes: list[int]
    squeezed: list[bool]
    axis: int
    length: int

    @classmethod
    def of(cls, ref: ir.Value, indices: Any) -> "_Slice":
        """The slice of an array."""
        shape = ir.MemRefType(ref.type).shape
        parsed = utils.parse_indices(indices, shape, check_oob=False)
        kept = [axis for axis, is_squeezed in enumerate(parsed[2]) if not is_squeezed]
        axis = kept[-2:][0]
        return cls(*parsed, axis, shape[axis])

    @property
    def begin(self) -> ir.Value:
        """The first row."""
        begin = self.begins[self.axis]
        return utils.c(begin, ir.IndexType.get()) if isinstance(begin, int) else begin

    @property
    def rows(self) -> int:
        """How many there are."""
        return self.sizes[self.axis]

    def with_rows(self, begin: ir.Value, rows: int) -> tuple[Any, ...]:
        """Indices of other rows of the array, at the same places of all other axes."""
        indices = [
            first if is_squeezed else utils.ds(first, size)
            for first, size, is_squeezed in zip(self.begins, self.sizes, self.squeezed, strict=True)
        ]
        indices[self.axis] = utils.ds(begin, rows)
        return tuple(indices)


def _as_rows(smem_ref: ir.Value) -> ir.Value | None:
    """A tile whose blocks lie one behind the other as a matrix; None where they lie otherwise."""
    blocks, blocks_wide, rows, columns = ir.MemRefType(smem_ref.type).shape
    strides, _ = ir.MemRefType(smem_ref.type).get_strides_and_offset()
    if blocks_wide > 1 or (blocks > 1 and strides[0] != rows * columns):
        return None
    return utils.memref_fold(utils.memref_slice(smem_ref, (slice(None), 0)), 0, 2)
