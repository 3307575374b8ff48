"""TMA copies of arrays whose length is no multiple of 8.

Shared memory holds a matrix in blocks of 8 rows, as WGMMA reads it. Pallas describes the array in
global memory to TMA by such blocks too, and refuses a length that they do not divide: TMA knows the
number of blocks, so it would also copy the rows behind the last one, which belong to the next row
of the batch. Here most tiles are copied by whole blocks. A tile that reaches beyond the last whole
block is copied block by block, described by rows, so that TMA leaves out what is behind the array.
"""

import dataclasses
from functools import partial
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.launch_context import Rounding
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf

BLOCK = 8
"""Rows of a block."""


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
    copy: Any,
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
    shape = ir.MemRefType(gmem_ref.type).shape
    begins, sizes, squeezed = utils.parse_indices(gmem_slice, shape, check_oob=False)
    axis = [n for n, is_squeezed in enumerate(squeezed) if not is_squeezed][-2:][0]
    if not gmem_transform or shape[axis] % BLOCK == 0:
        copy(
            src_ref=src_ref,
            dst_ref=dst_ref,
            gmem_slice=gmem_slice,
            gmem_transform=gmem_transform,
            arrive=arrive,
            **options,
        )
        return
    assert not (to_smem and arrive), "Pallas itself arrives at the barrier"
    (tile,) = gmem_transform
    index = ir.IndexType.get()
    begin = begins[axis] if isinstance(begins[axis], ir.Value) else utils.c(begins[axis], index)
    rows = sizes[axis]

    def copy_rows(begin: ir.Value, rows: int, smem: ir.Value, *transform: Any) -> None:
        slices = [
            begin if is_squeezed else utils.ds(begin, size)
            for begin, size, is_squeezed in zip(begins, sizes, squeezed, strict=True)
        ]
        slices[axis] = utils.ds(begin, rows)
        refs = (gmem_ref, smem) if to_smem else (smem, gmem_ref)
        copy(
            src_ref=refs[0],
            dst_ref=refs[1],
            gmem_slice=tuple(slices),
            gmem_transform=transform,
            arrive=False,
            **options,
        )

    def copy_block(n: int | ir.Value, begin: ir.Value) -> None:
        by_rows = mgpu.TileTransform(tile.tiling[1:]), mgpu.TransposeTransform((1, 0, 2))
        copy_rows(begin, BLOCK, utils.memref_slice(smem_ref, n), *by_rows)

    if (as_rows := _as_rows(smem_ref)) is not None:
        copy_rows(begin, rows, as_rows)
    elif rows == BLOCK:
        copy_block(0, begin)
    else:
        end = arith.addi(begin, utils.c(rows, index))
        whole_blocks = utils.c(shape[axis] // BLOCK * BLOCK, index)
        inside = arith.cmpi(arith.CmpIPredicate.ule, end, whole_blocks)
        branches = scf.IfOp(inside, has_else=True)
        with ir.InsertionPoint(branches.then_block):
            whole = dataclasses.replace(tile, rounding=Rounding.DOWN)
            copy_rows(begin, rows, smem_ref, whole)
            scf.yield_([])
        with ir.InsertionPoint(branches.else_block):

            @utils.fori(utils.c(rows // BLOCK, index), ())
            def _(n, _):
                copy_block(n, arith.addi(begin, arith.muli(n, utils.c(BLOCK, index))))
                return ()

            scf.yield_([])
    if arrive:
        nvvm.cp_async_bulk_commit_group()


def _as_rows(smem_ref: ir.Value) -> ir.Value | None:
    """Blocks of 8 rows one behind the other as one matrix; None where they lie otherwise."""
    blocks, blocks_wide, rows, columns = ir.MemRefType(smem_ref.type).shape
    strides, _ = ir.MemRefType(smem_ref.type).get_strides_and_offset()
    if blocks_wide > 1 or (blocks > 1 and strides[0] != rows * columns):
        return None
    return utils.memref_fold(utils.memref_slice(smem_ref, (slice(None), 0)), 0, 2)
