"""Tiles of float32 numbers in global memory, in the order in which threads hold them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels._mosaic_gpu.primitives import MATRIX, ROWS

_VECTOR = 4


WIDTH = 256
"""The most numbers in a row that TMA copies."""


def tile_shape(columns: int) -> tuple[int, int]:
    """The shape of what `store` makes of a matrix of so many columns, a multiple of 8."""
    return ROWS * columns // WIDTH, WIDTH


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
    row_of_threads = WIDTH // _VECTOR
    row = arith.index_cast(index, arith.divui(thread, number(row_of_threads)))
    column = arith.muli(arith.remui(thread, number(row_of_threads)), number(_VECTOR))
    column = arith.index_cast(index, column)
    for n in range(0, pairs, 2):
        rows_before = utils.c(n // 2 * utils.WARPGROUP_SIZE // row_of_threads, index)
        yield [arith.addi(row, rows_before), column]
