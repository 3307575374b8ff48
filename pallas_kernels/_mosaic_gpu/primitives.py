"""What the Mosaic GPU kernels share: layouts, shared memory, loops, and what Pallas lacks."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector

from pallas_kernels._mosaic_gpu.tiles import FOLD
from pallas_kernels._spec import KeyRun


def across(x: Array) -> Array:
    """A row as a matrix of equal rows."""
    return lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])


def zeros(width: int) -> Array:
    """A matrix of zeros, to add products to."""
    return plgpu.layout_cast(lax.broadcast(jnp.float32(0), (ROWS, width)), MATRIX)


ROWS = 64
"""Rows of a warpgroup's matrices: what a WGMMA instruction has."""


MATRIX = plgpu.Layout.WGMMA


COLUMN = plgpu.Layout.WGMMA.reduce(1)


ROW = plgpu.Layout.WGMMA.reduce(0)


def swizzled(shape: tuple[int, ...], dtype, inner: int | None = None, columns: int | None = None):
    """SMEM that TMA writes and WGMMA reads.

    ``inner`` is the length of a product's inner axis, ``columns`` that of a part of each row.
    """
    size = jnp.dtype(dtype).itemsize

    def fits(swizzle):
        width = columns or shape[-1]
        return not width * size % swizzle and not (inner or 0) * size % swizzle

    swizzle = next(filter(fits, (128, 64, 32)))
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(ref: Any, layout) -> Array:
    """All of a ref."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]  # jax 0.10's


def of_eighths(run: KeyRun) -> KeyRun:
    """The run with zeros before it, so that TMA can count it by 8 rows.

    They stand before all keys that a window reaches: only the farthest part of a halo is of
    another length.
    """
    missing = -run.key.shape[1] % 8
    if not missing:
        return run
    pad = ((0, 0), (missing, 0), (0, 0), (0, 0))
    return KeyRun(jnp.pad(run.key, pad), jnp.pad(run.value, pad), run.offset - missing)


def spread(x: Array, width: int) -> Array:
    """A column as a matrix of equal columns."""
    return lax.broadcast_in_dim(x, (ROWS, width), [0])


def fold_columns(combine: Callable[[Array, Array], Array], x: Array) -> Array:
    """The columns of a matrix combined into ``FOLD``, in each thread by itself."""
    return functools.reduce(combine, [x[:, n : n + FOLD] for n in range(0, x.shape[1], FOLD)])


def fori(begin, end, body, carry):
    """A loop whose bounds may be Python's integers."""
    return lax.fori_loop(jnp.int32(begin), jnp.int32(end), body, carry)


def tell_and_wait(told: Any, tells: Any, turn: Any, value: Any, behind: int = 0) -> None:
    """Adds one to a counter if it ``tells``, and waits until another one has reached a value.

    Both are in global memory. Who sees the first one grow sees all that this warpgroup has written
    through TMA, but for so many copies ``behind``; and this warpgroup what was written before the
    second one grew.
    """
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(ref, scalar, ref, scalar))
    def side_by_side(_, told, tells, turn, value):
        i32 = ir.IntegerType.get_signless(32)
        thread = arith.remui(utils.thread_idx(), utils.c(utils.WARPGROUP_SIZE, i32))
        first = utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)  # TMA's
        tells = arith.cmpi(arith.CmpIPredicate.ne, tells.registers[()], utils.c(0, i32))
        with utils.when(arith.andi(first, tells)):
            nvvm.cp_async_bulk_wait_group(behind)
            _ptx("red.release.gpu.global.add.u32 [$0], 1;", utils.memref_ptr(told))
        other_warp = arith.cmpi(arith.CmpIPredicate.eq, thread, utils.c(utils.WARP_SIZE, i32))
        with utils.when(other_warp):
            _ptx(
                "{ .reg .pred waits; .reg .b32 now; "
                "again: ld.acquire.gpu.global.u32 now, [$0]; setp.lt.u32 waits, now, $1; "
                "@waits bra again; fence.proxy.async.global; }",
                utils.memref_ptr(turn),
                value.registers[()],
            )
        utils.warpgroup_barrier()

    side_by_side(told, jnp.int32(tells), turn, value)


def tell_of_stores(told: Any) -> None:
    """Adds one to a counter in global memory, behind all that this warpgroup has stored there.

    For what threads store by themselves, as `tell_and_wait` is for TMA.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def behind_stores(_, told):
        utils.warpgroup_barrier()
        with utils.when(utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP)):
            _ptx("red.release.gpu.global.add.u32 [$0], 1;", utils.memref_ptr(told))

    behind_stores(told)


def release_smem() -> None:
    """Lets TMA and WGMMA see what a thread has written, once it has arrived at a barrier.

    ``plgpu.commit_smem`` without waiting for the other threads of the warpgroup.
    """

    @plgpu.inline_mgpu(arg_types=())
    def fence(_):
        _ptx("fence.proxy.async.shared::cta;")

    fence()


def fresh(x: Any) -> Array:
    """The number x, of which the compiler knows nothing.

    So what is computed from it stays where it is used: moved out of a loop, it would take
    registers that matrices need.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT(()),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(())),
    )
    def hide(_, x):
        number = x.registers[()]
        hidden = _ptx("mov.b32 $0, $1;", number, result_types=number.type)
        return type(x).splat(hidden, (), is_signed=True)

    return hide(jnp.int32(x))


def not_all_one(x: Array) -> Array:
    """Whether any of the numbers that a warp holds of a column is not 1.

    Warps may have different answers: what depends on one must not wait for other warps.
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
