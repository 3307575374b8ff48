"""Gradients of queries as the fused backward kernel adds them up, and what makes them an array.

They are float32, tile by tile of `ROWS` queries of a head, in the order in which the registers of
the threads have them: so shared memory takes 16 bytes of each thread at once, without conflicts,
and TMA adds one block of memory to another.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels._mosaic_blocks import MATRIX, ROWS, load, swizzled
from pallas_kernels._mosaic_gradients import zeros

_VECTOR = 4
_WIDTH = 256
"""The most numbers in a row that TMA copies."""


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


def _load(ref: Any, columns: int) -> Array:
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


def finish(
    total: Array,
    seen: Array,
    more: Array | None,
    *,
    scale: float,
    rows: int,
    dtype: jnp.dtype,
) -> Array:
    """``scale * total`` as an array, plus the gradients that there are ``more``.

    Args:
        total: [B, N, tiles, parts of columns, `tile_shape`].
        seen: [B or 1, tiles], whether there is anything in the total.
        more: [B, at most rows, N, H] in float32.
        scale: factor of the total.
        rows: how many of the queries to return.
        dtype: of the result.

    Returns:
        [B, rows, N, H].
    """
    batch, heads, tiles, parts = total.shape[:4]
    half = total.shape[4] * _WIDTH // ROWS
    dim = parts * half
    stored = rows if rows % 8 == 0 else tiles * ROWS
    near = 0
    operands: dict[str, Any] = {"total": total, "seen": seen.astype(jnp.int32)}
    if more is not None:
        near = -(-more.shape[1] // ROWS)
        pad = near * ROWS - more.shape[1]
        operands["more"] = jnp.pad(more, ((0, 0), (0, pad), (0, 0), (0, 0)))

    def ring_swa_backward_finish(*refs):
        inputs = dict(zip((*operands, "out"), refs, strict=True))

        def body(smem):
            index = lax.axis_index("program")
            head = lax.rem(index, jnp.int32(heads))
            index = lax.div(index, jnp.int32(heads))
            tile, row = lax.rem(index, jnp.int32(tiles)), lax.div(index, jnp.int32(tiles))
            used = inputs["seen"][row if len(seen) > 1 else 0, tile] > 0
            found = inputs["total"].at[row, head, tile]
            results = lax.cond(
                used,
                lambda: tuple(_load(found.at[part], half) * scale for part in range(parts)),
                lambda: (zeros(half),) * parts,
            )
            for part, result in enumerate(results):
                columns = pl.ds(part * half, half)
                if near:
                    here = (row, pl.ds(jnp.minimum(tile, near - 1) * ROWS, ROWS), head, columns)
                    result = lax.cond(
                        tile < near,
                        lambda x, here=here: x + load(inputs["more"].at[here], MATRIX),
                        lambda x: x,
                        result,
                    )
                smem[part][...] = result.astype(dtype)
            plgpu.commit_smem()
            for part in range(parts):
                columns = pl.ds(part * half, half)
                there = inputs["out"].at[row, pl.ds(tile * ROWS, ROWS), head, columns]
                plgpu.copy_smem_to_gmem(smem[part], there)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(body, [swizzled((ROWS, half), dtype)] * parts)

    (out,) = plgpu.kernel(
        ring_swa_backward_finish,
        out_type=(jax.ShapeDtypeStruct((batch, stored, heads, dim), dtype),),
        grid=(batch * tiles * heads,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands.values())
    return out[:, :rows]
