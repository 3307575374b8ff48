"""Implementation "mosaic_gpu": Mosaic GPU kernels for Hopper.

There are three fused backward kernels: one for short windows of the shard's own keys, without sink
tokens and for heads of 32 and 64; one for heads of up to 128 in steps of 32, and one for heads of
192 and 256, where `_tiles.fuses_backward` says so. Sinks that windows do not reach are added by the
launch that finishes the gradients of queries. Else the backward pass is Triton's, or where this JAX
has no Triton that of "xla".
"""

from functools import partial
from types import ModuleType

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import (
    _device,
    _mosaic_backward,
    _mosaic_backward_short,
    _mosaic_backward_sinks,
    _mosaic_backward_wide,
    _mosaic_dquery,
    _tiles,
    _xla,
)
from pallas_kernels._head_dims import check_head_dims
from pallas_kernels._mosaic_forward import forward as _forward
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts, State

_other: ModuleType = _xla
if _device.has_triton():
    from pallas_kernels import _triton

    _other = _triton


def check(spec: Spec, query: Array, value: Array) -> None:
    """Checks that the kernels can compute this here.

    Raises:
        NotImplementedError: they cannot; names the argument.
    """
    _device.check_mosaic_gpu()
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
        tuple(_of_eighths(run) for run in runs),
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
    dtypes = dict(dquery_dtype=dquery_dtype, dkey_dtype=dkey_dtype)
    kernel = _fused_kernel(spec, query, runs, sinks)
    if kernel is None:
        return _other.backward(
            spec, query, runs, sinks, start, out, dout, lse, dquery, rows=rows, **dtypes
        )
    (run,) = runs
    dsinks = None
    if kernel == "short":
        processors = _device.multiprocessors()
        dquery, dkey, dvalue, delta = _mosaic_backward_short.backward(
            spec, query, run, start, out, dout, lse, dquery, processors=processors, **dtypes
        )
    else:
        far_sinks = _far_sinks(spec, run, sinks)
        delta = _xla.delta_of(out[:, :rows], dout[:, :rows], jnp.float32)
        fused = _mosaic_backward if kernel == "any" else _mosaic_backward_wide
        launch = partial(
            _by_parts_of_groups,
            partial(fused.backward, spec, query),
            query,
            _of_eighths(run),
            partial(
                _tiles.parts_of_group,
                processors=_device.multiprocessors(),
                ramp=_ramps(spec, run, start, rows),
            ),
            fused.KEYS,
            start,
            dout,
            lse,
            delta,
            rows=rows,
            ordered=ordered,
        )
        if far_sinks:
            total, dkey, dvalue = launch(dkey_dtype=jnp.float32)
            dquery, dkey, dvalue, dsinks = _mosaic_backward_sinks.backward(
                spec, query, run, sinks, start, dout, lse, delta, total, dquery, dkey, dvalue,
                dquery_dtype=dquery_dtype,
            )  # fmt: skip
            dkey, dvalue = dkey.astype(dkey_dtype), dvalue.astype(dkey_dtype)
        elif (
            kernel == "any"
            and ordered
            and not run.offset
            and dquery_dtype == query.dtype
            and _tiles.rounds_within_backward(spec.window, packed=start.ndim > 0)
        ):
            dquery, dkey, dvalue = launch(
                dkey_dtype=dkey_dtype, more=dquery, dquery_dtype=dquery_dtype
            )
        else:
            total, dkey, dvalue = launch(dkey_dtype=dkey_dtype)
            dquery = _mosaic_dquery.finish(
                total, dquery, scale=spec.scale, rows=rows, dtype=dquery_dtype
            )
    # Without it, adding a halo's gradients in place crashes the compiler of jax 0.11.2.
    dkey, dvalue = lax.optimization_barrier((dkey, dvalue))
    missing = dkey.shape[1] - run.key.shape[1]
    return dquery, ((dkey[:, missing:], dvalue[:, missing:]),), dsinks, delta


def _ramps(spec: Spec, run: KeyRun, start: Starts, rows: int) -> bool:
    """Whether the first keys of a run are seen by next to all queries, the last by next to none.

    Or the other way round; else all are seen by as many.
    """
    if spec.window is None:
        return not run.offset and start.ndim == 0
    return run.offset < 0 and run.offset + spec.window < rows - 1


def _by_parts_of_groups(
    kernel, query: Array, run: KeyRun, parts_of_group, key_tile: int, *arrays, **options
):
    """Runs a fused kernel with groups of query heads cut where there are few programs.

    To each part of a group its keys are those of a head of their own.
    """
    batch, keys, num_kv, _ = run.key.shape
    programs = -(-keys // key_tile) * num_kv * batch
    parts = parts_of_group(programs, query.shape[2] // num_kv)
    if parts == 1:
        return kernel(run, *arrays, **options)
    key, value = (jnp.repeat(x, parts, axis=2) for x in (run.key, run.value))
    dtype = options.pop("dkey_dtype")
    run = KeyRun(key, value, run.offset)
    dquery, *gradients = kernel(run, *arrays, dkey_dtype=jnp.float32, **options)
    dkey, dvalue = (
        x.reshape(batch, keys, num_kv, parts, -1).sum(3).astype(dtype) for x in gradients
    )
    return dquery, dkey, dvalue


def _far_sinks(spec: Spec, run: KeyRun, sinks: SinkRun | None) -> bool:
    """Whether queries may see sinks that their windows do not reach."""
    return spec.window is not None and (sinks is not None or spec.sinks_in(run.offset) > 0)


def _fused_kernel(
    spec: Spec,
    query: Array,
    runs: tuple[KeyRun, ...],
    sinks: SinkRun | None,
) -> str | None:
    """Which fused backward kernel can do this and is expected to be faster than two kernels."""
    window, (run, *others) = spec.window, runs
    dim, value_dim = query.shape[-1], run.value.shape[-1]
    far_sinks = _far_sinks(spec, run, sinks)
    widest = max(dim, value_dim)
    fits = dim % 32 == 0 if widest <= 128 else _mosaic_backward_wide.takes(dim, value_dim)
    if others or not fits or (far_sinks and not _mosaic_backward_sinks.takes(spec)):
        return None
    short = window is not None and window <= _mosaic_backward_short.LONGEST_WINDOW
    if short and not run.offset and not far_sinks and widest <= 64 and value_dim % 32 == 0:
        return "short"
    if not _tiles.fuses_backward(widest, window):
        return None
    return "any" if widest <= 128 else "wide"


def _programs(spec: Spec) -> int:
    """How many programs share the tiles.

    Under a window all have as many keys, and each multiprocessor gets its share at once. Without
    one the GPU deals them out.
    """
    return _device.multiprocessors() if spec.window is not None else 2**31 - 1


def _of_eighths(run: KeyRun) -> KeyRun:
    """The run with zeros before it, so that TMA can count it by 8 rows.

    They stand before all keys that a window reaches: only the farthest part of a halo is of
    another length.
    """
    missing = -run.key.shape[1] % 8
    if not missing:
        return run
    pad = ((0, 0), (missing, 0), (0, 0), (0, 0))
    return KeyRun(jnp.pad(run.key, pad), jnp.pad(run.value, pad), run.offset - missing)


def _tiles_for(spec: Spec, query: Array, run: KeyRun, *, whole: bool) -> _tiles.MosaicTiles:
    heads, dim = query.shape[2:]
    group = heads // run.key.shape[2]
    return _tiles.mosaic_tiles(
        dim, run.value.shape[-1], spec.window, group, whole=whole, sinks=spec.num_sinks > 0
    )
