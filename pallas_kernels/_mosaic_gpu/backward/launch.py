"""The launch of a backward kernel: arrays by name, and outputs that vary over mesh axes again."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._mosaic_gpu.ragged_copies import allow_any_length
from pallas_kernels._varying import vary_as

WARPGROUPS_APART = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
)
"""For kernels whose warpgroups have roles of their own, named "warpgroup"."""


def launch(
    kernel: Callable[[dict[str, Any]], None],
    operands: Mapping[str, Any],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    programs: int,
    varies_as: Array,
    compiler_params: plgpu.CompilerParams,
    warpgroups: int | None = None,
) -> dict[str, Array]:
    """Runs a kernel.

    Args:
        kernel: what a program does with the references to operands and outputs, by name.
        operands: arrays, or references that the kernel also writes.
        outputs: their types.
        programs: how many there are; the axis is named "program".
        varies_as: the array whose manual mesh axes the results vary over.
        compiler_params: of the kernel.
        warpgroups: of a program, if they have roles of their own.

    Returns:
        The outputs by name.
    """

    def with_names(*refs):
        allow_any_length()
        kernel(dict(zip((*operands, *outputs), refs, strict=True)))

    with_names.__name__ = kernel.__name__  # that of the kernel in profiles
    threads: dict[str, Any] = {}
    if warpgroups is not None:
        threads = {"num_threads": warpgroups, "thread_name": "warpgroup"}
    results = plgpu.kernel(
        with_names,
        out_type=tuple(outputs.values()),
        grid=(programs,),
        grid_names=("program",),
        compiler_params=compiler_params,
        **threads,
    )(*operands.values())
    arrays = [vary_as(varies_as, x) for x in results]
    return dict(zip(outputs, arrays, strict=True))
