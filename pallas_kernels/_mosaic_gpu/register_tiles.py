"""Float32 matrices in memory, in the order in which the registers of the threads hold them.

The n-th four numbers of thread t lie at ``4 * (128 * n + t)``. So a warp stores or loads 512
consecutive bytes at once, without bank conflicts, and TMA adds one matrix to another as a block of
memory.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Float32

from pallas_kernels._mosaic_gpu.primitives import MATRIX, ROWS

WIDTH = 256
"""Elements in a row of memory: the most that TMA copies along an axis."""


_VECTOR = 4
"""Numbers that a thread stores at once: 16 bytes."""


def tile_shape(columns: int) -> tuple[int, int]:
    """The shape in memory of a matrix of so many columns, a multiple of 8."""
    return ROWS * columns // WIDTH, WIDTH


def store(ref: Any, x: Float32[Array, "64 columns"]) -> None:
    """Stores a matrix; ``ref`` has its `tile_shape`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), MATRIX))
    def store_registers(_, ref, x):
        pairs = list(x.registers.flat)
        indices = _indices(len(pairs))
        for index, first, second in zip(indices, pairs[::2], pairs[1::2], strict=True):
            vector.store(vector.shuffle(first, second, list(range(_VECTOR))), ref, index)

    store_registers(ref, x)


def load(ref: Any, columns: int) -> Float32[Array, "64 {columns}"]:
    """The matrix of so many columns that `store` has stored."""
    result = plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, layout=MATRIX)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def load_registers(_, ref):
        layout = MATRIX.to_mgpu()
        shape = layout.registers_shape((ROWS, columns))
        kind = ir.VectorType.get((_VECTOR,), ir.F32Type.get())
        pairs = []
        for index in _indices(int(np.prod(shape))):
            four = vector.load(kind, ref, index)
            pairs += [vector.shuffle(four, four, [n, n + 1]) for n in (0, 2)]
        registers = np.empty(len(pairs), object)
        registers[:] = pairs
        return FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)

    return load_registers(ref)


def _indices(pairs: int) -> Iterator[list[ir.Value]]:
    """Row and column in memory of each four of a thread's numbers, ``pairs`` of registers."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()

    def number(n):
        return utils.c(n, i32)

    thread = arith.remui(utils.thread_idx(), number(utils.WARPGROUP_SIZE))
    threads_per_row = WIDTH // _VECTOR
    row = arith.index_cast(index, arith.divui(thread, number(threads_per_row)))
    column = arith.muli(arith.remui(thread, number(threads_per_row)), number(_VECTOR))
    column = arith.index_cast(index, column)
    for n in range(0, pairs, 2):
        rows_before = utils.c(n // 2 * utils.WARPGROUP_SIZE // threads_per_row, index)
        yield [arith.addi(row, rows_before), column]
