"""Implementation "mosaic_gpu": Mosaic GPU kernels for Hopper.

Where no fused backward kernel is for what is asked (`backward/choice.py`), the backward
pass is Triton's, or where this JAX has no Triton that of "xla".
"""

from functools import partial
from types import ModuleType

import jax.numpy as jnp
from jax import Array

from pallas_kernels import _device, _support, _xla
from pallas_kernels._mosaic_gpu.backward import choice
from pallas_kernels._mosaic_gpu.forward.kernel import forward as _forward
from pallas_kernels._mosaic_gpu.primitives import of_eighths
from pallas_kernels._mosaic_gpu.tiles import MosaicTiles, mosaic_tiles
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts, State
from pallas_kernels._support import check_head_dims

_other: ModuleType = _xla
if _support.has_triton():
    from pallas_kernels._triton import kernels as _triton

    _other = _triton


def check(spec: Spec, query: Array, value: Array) -> None:
    """Checks that the kernels can compute this here.

    Raises:
        NotImplementedError: they cannot; names the argument.
    """
    _support.check_mosaic_gpu()
    _other.check(spec, query, value)
    check_head_dims("mosaic_gpu", query, value)
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"implementation='mosaic_gpu' takes bfloat16 or float16, got q of {query.dtype}"
        )
    if query.shape[1] % 8:
        raise NotImplementedError(
            "implementation='mosaic_gpu' takes shards of a multiple of 8 tokens, "
            f"got {query.shape[1]}"
        )


def query_tile_rows(spec: Spec, query: Array, run: KeyRun) -> int:
    """Launches begin at multiples of a query tile."""
    return _tiles_for(spec, query, run, whole=True).positions


def forward(
    spec: Spec,
    query: Array,
    runs: tuple[KeyRun, ...],
    sinks: SinkRun | None,
    sink_logits: Array | None,
    start: Starts,
    state: State | None,
    *,
    rows: tuple[int, int],
    resume: bool,
    out_dtype: jnp.dtype,
) -> State:
    """As ``pallas_kernels._xla.forward``."""
    return _forward(
        spec,
        query,
        tuple(of_eighths(run) for run in runs),
        sinks,
        sink_logits,
        start,
        state,
        rows=rows,
        resume=resume,
        out_dtype=out_dtype,
        tiles=_tiles_for(spec, query, runs[0], whole=not resume and out_dtype == query.dtype),
        programs=_programs(spec),
    )


def joins(spec: Spec, query: Array, runs: tuple[KeyRun, ...], sinks: SinkRun | None) -> bool:
    """Whether `backward` takes less time for a halo and own keys together than one by one."""
    return choice.takes(spec, query, runs, sinks)


def backward(
    spec: Spec,
    query: Array,
    runs: tuple[KeyRun, ...],
    sinks: SinkRun | None,
    start: Starts,
    out: Array,
    dout: Array,
    lse: Array,
    dquery: Array | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
    ordered: bool = True,
) -> tuple[Array, tuple[tuple[Array, Array], ...], SinkRun | None, Array]:
    """As ``pallas_kernels._xla.backward``.

    Unless ``ordered``, the gradients of queries are added up in any order.
    """
    function = _other.backward
    if choice.takes(spec, query, runs, sinks):
        function = partial(choice.backward, ordered=ordered)
    return function(
        spec, query, runs, sinks, start, out, dout, lse, dquery,
        rows=rows, dquery_dtype=dquery_dtype, dkey_dtype=dkey_dtype,
    )  # fmt: skip


def _programs(spec: Spec) -> int:
    """How many programs share the tiles.

    Under a window all have as many keys, and each multiprocessor gets its share at once. Without
    one the GPU deals them out.
    """
    return _device.multiprocessors() if spec.window is not None else 2**31 - 1


def _tiles_for(spec: Spec, query: Array, run: KeyRun, *, whole: bool) -> MosaicTiles:
    heads, dim = query.shape[2:]
    group = heads // run.key.shape[2]
    return mosaic_tiles(
        dim, run.value.shape[-1], spec.window, group, whole=whole, sinks=spec.num_sinks > 0
    )
