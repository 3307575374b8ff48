"""What the Mosaic GPU kernels share: layouts, shared memory, semaphores, and what Pallas lacks.

A *matrix* here has `ROWS` rows in the registers of a warpgroup, as WGMMA leaves its result. A
*column* has one number for each row of a matrix, a *row* one number for each column.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector
from jaxtyping import Bool, Float32, Int, Shaped

from pallas_kernels._mosaic_gpu.tiles import FOLD

ROWS = 64
"""Rows of a matrix: M of a WGMMA instruction."""


Index = Int[Array, ""]
"""An int32 number that a program computes: of a tile, a head, a slot, a position."""


MATRIX = plgpu.Layout.WGMMA
"""Each of four warps has 16 rows; a thread has 2 of every 8 columns, in two rows."""


COLUMN = plgpu.Layout.WGMMA.reduce(1)
"""The layout of what is left of a matrix when its columns are reduced."""


ROW = plgpu.Layout.WGMMA.reduce(0)
"""The layout of what is left of a matrix when its rows are reduced."""


def zeros(columns: int) -> Float32[Array, "64 {columns}"]:
    """A matrix of zeros."""
    return plgpu.layout_cast(lax.broadcast(jnp.float32(0), (ROWS, columns)), MATRIX)


def broadcast_row(x: Shaped[Array, "columns"]) -> Shaped[Array, "64 columns"]:
    """A matrix of which each row is x."""
    return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])


def broadcast_column(x: Shaped[Array, "64"], columns: int) -> Shaped[Array, "64 {columns}"]:
    """A matrix of which each column is x."""
    return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def fold_columns(
    combine: Callable[[Array, Array], Array], x: Float32[Array, "64 columns"]
) -> Float32[Array, "64 8"]:
    """Combines column n with columns n + `FOLD`, n + 2 * `FOLD`, ...; no thread needs another."""
    return functools.reduce(combine, [x[:, n : n + FOLD] for n in range(0, x.shape[1], FOLD)])


def swizzled(shape: tuple[int, ...], dtype, inner: int | None = None, columns: int | None = None):
    """SMEM that TMA writes and WGMMA reads, with the widest swizzle that fits.

    Args:
        shape: of the array; its last two axes are tiled.
        dtype: of the array.
        inner: length of the axis that WGMMA contracts, where that is not the last one.
        columns: of the parts in which the last axis is sliced, if it is.
    """
    size = jnp.dtype(dtype).itemsize

    def fits(swizzle):
        width = columns or shape[-1]
        return not width * size % swizzle and not (inner or 0) * size % swizzle

    swizzle = next(filter(fits, (128, 64, 32)))
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load_as(ref: Any, layout) -> Array:
    """All of a ref, in global or shared memory, as an array of this layout."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # jax 0.10's


def fori(begin, end, body, carry):
    """``lax.fori_loop`` whose bounds may be Python's integers."""
    return lax.fori_loop(jnp.int32(begin), jnp.int32(end), body, carry)


def semaphore_signal_and_wait(
    signal: Any,
    signals: int | Index,
    wait_for: Any,
    value: Index,
    behind: int = 0,
) -> None:
    """Increments ``signal`` if ``signals`` is not 0; waits until ``wait_for`` is at least a value.

    Incrementing ``signal`` releases all TMA stores of this warpgroup except the last ``behind``
    groups. Waiting on ``wait_for`` acquires what other programs have released.

    Args:
        signal: ref of one int32 in global memory.
        signals: whether to increment it.
        wait_for: another one.
        value: to wait for.
        behind: how many groups of copies may still be under way when ``signal`` is incremented.
    """
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(ref, scalar, ref, scalar))
    def signal_and_wait(_, signal, signals, wait_for, value):
        i32 = ir.IntegerType.get_signless(32)
        thread = arith.remui(utils.thread_idx(), utils.c(utils.WARPGROUP_SIZE, i32))
        # The thread that issues this warpgroup's TMA copies: only this one can wait for them.
        tma_thread = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)
        signals = arith.cmpi(arith.CmpIPredicate.ne, signals.registers[()], utils.c(0, i32))
        with utils.when(arith.andi(tma_thread, signals)):
            nvvm.cp_async_bulk_wait_group(behind)
            _ptx("red.release.gpu.global.add.u32 [$0], 1;", utils.memref_ptr(signal))
        # A thread of another warp spins meanwhile.
        spinning_thread = arith.cmpi(arith.CmpIPredicate.eq, thread, utils.c(utils.WARP_SIZE, i32))
        with utils.when(spinning_thread):
            _ptx(
                "{ .reg .pred waits; .reg .b32 now; "
                "again: ld.acquire.gpu.global.u32 now, [$0]; setp.lt.u32 waits, now, $1; "
                "@waits bra again; fence.proxy.async.global; }",
                utils.memref_ptr(wait_for),
                value.registers[()],
            )
        utils.warpgroup_barrier()

    signal_and_wait(signal, jnp.int32(signals), wait_for, value)


def semaphore_signal_after_stores(signal: Any) -> None:
    """Increments an int32 in global memory; releases what this warpgroup's threads have stored.

    For stores by threads, as `semaphore_signal_and_wait` is for stores by TMA.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal_after_stores(_, signal):
        utils.warpgroup_barrier()
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            _ptx("red.release.gpu.global.add.u32 [$0], 1;", utils.memref_ptr(signal))

    signal_after_stores(signal)


def fence_async_smem() -> None:
    """Makes a thread's writes to SMEM visible to TMA and WGMMA once it has arrived at a barrier.

    As ``plgpu.commit_smem``, but without waiting for the other threads of the warpgroup.
    """

    @plgpu.inline_mgpu(arg_types=())
    def fence(_):
        _ptx("fence.proxy.async.shared::cta;")

    fence()


def opaque_to_compiler(x: int | Index) -> Index:
    """The number x, whose value the compiler cannot know.

    What is computed from it is therefore computed where it is used. Moved out of a loop, it would
    hold registers that matrices need.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT(()),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def identity(_, x):
        number = x.registers[()]
        opaque = _ptx("mov.b32 $0, $1;", number, result_types=number.type)
        return type(x).splat(opaque, (), is_signed=True)

    return identity(jnp.int32(x))


def not_all_one(x: Float32[Array, "64"]) -> Bool[Array, ""]:
    """Whether any number of a column is not 1, among the rows of the warp that asks.

    Warps may get different answers, so a branch on one must not wait for other warps.
    """
    answer = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(COLUMN,), return_type=answer)
    def vote(_, x):
        first, second = (
            vector.extract(pair, dynamic_position=[], static_position=[0])
            for pair in x.registers.flat
        )
        other = _ptx(
            "{ .reg .pred p, q; setp.neu.f32 p, $1, 0f3f800000; "
            "setp.neu.or.f32 p, $2, 0f3f800000, p; "
            "vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }",
            first,
            second,
            result_types=ir.IntegerType.get_signless(32),
        )
        return type(x).splat(other, (), is_signed=True)

    return vote(x) != 0


def _ptx(code: str, *operands, result_types=None):
    """Instructions that the compiler neither moves nor leaves out."""
    options = dict(result_types=result_types, has_side_effects=True)
    return utils.inline_ptx(code, *operands, **options)  # type: ignore[attr-defined]  # jax 0.10's
