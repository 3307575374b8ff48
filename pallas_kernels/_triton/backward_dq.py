"""Backward kernel in Pallas-Triton for the queries' gradient, by tiles of queries.

It recomputes the softmax from the log-sum-exp over all keys, and leaves ``delta`` to the kernels
of the keys' gradients.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._kernels import BackwardInputs
from pallas_kernels._logits import cap_logits
from pallas_kernels._masks import is_real
from pallas_kernels._spec import Spec
from pallas_kernels._triton.blocks import (
    dot,
    exp2_scaled,
    head_parts,
    inner,
    load_rows,
    load_vector,
    log2_sums,
    store_rows,
)
from pallas_kernels._triton.key_loop import over_keys
from pallas_kernels._triton.query_launch import QueryLaunch
from pallas_kernels._triton.tiles import TritonTiles
from pallas_kernels._varying import shape_like_varying


def backward_dq(
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Array | None,
    *,
    rows: int,
    out_dtype: jnp.dtype,
    tiles: TritonTiles,
    interpret: bool,
) -> tuple[Array, Array]:
    """Gradient of the first ``rows`` queries, ``dquery`` of the first R of them added; delta."""
    query, dout, lse = inputs.query, inputs.dout, inputs.lse
    batch, _, heads, dim = query.shape
    launch = QueryLaunch(spec, inputs, (0, rows), tiles)
    shapes = (
        shape_like_varying(query, (batch, rows, heads, dim), out_dtype),
        shape_like_varying(query, (batch, heads, rows), jnp.float32),
    )
    arrays = {**launch.arrays, "query": query, "dout": dout, "lse": lse}
    blocks = {
        **launch.blocks,
        "query": launch.head_block(query),
        "dout": launch.head_block(dout),
        "lse": launch.lse_block(lse),
    }
    if inputs.delta is not None:
        arrays["delta"], blocks["delta"] = inputs.delta, launch.lse_block(inputs.delta)
    else:
        arrays["out"], blocks["out"] = inputs.out, launch.head_block(inputs.out)
    if dquery is not None:
        arrays["dquery"], blocks["dquery"] = dquery, launch.head_block(dquery)

    program = _Program(spec, launch, dim, interpret)
    dquery, delta = pl.pallas_call(
        program.run,
        grid=launch.grid,
        in_specs=[blocks],
        out_specs=[launch.head_block(shapes[0]), launch.lse_block(shapes[1])],
        out_shape=list(shapes),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="ring_swa_backward_query",
    )(arrays)
    return dquery, delta


class _Program(NamedTuple):
    """What a program does: the gradients of a tile of queries.

    Attributes:
        spec: static settings.
        launch: what all programs have in common.
        dim: H.
        interpret: run in the interpreter.
    """

    spec: Spec
    launch: QueryLaunch
    dim: int
    interpret: bool

    def run(self, refs: dict[str, Any], dquery_ref: Any, delta_ref: Any) -> None:
        """Computes dquery, and delta unless it is given."""
        launch = self.launch
        tile = launch.query_rows(refs)
        queries, douts = (
            load_rows(refs[name], tile.rows, tile.valid) for name in ("query", "dout")
        )
        lse_log2 = log2_sums(load_vector(refs["lse"], tile.flat, tile.valid))
        if "delta" in refs:
            delta = load_vector(refs["delta"], tile.flat, tile.valid)
        else:
            outs = load_rows(refs["out"], tile.rows, tile.valid)
            delta = _rowsum(outs, douts, launch.size)
        real = is_real(tile.positions, tile.start, tile.end) if launch.packed else None
        if real is not None:
            delta = jnp.where(real, delta, 0.0)
        plgpu.store(delta_ref.at[tile.flat], delta, mask=tile.valid)

        body = partial(_add_gradient, self.spec, queries, douts, lse_log2, delta, self.interpret)
        widths = [width for _, width in head_parts(self.dim)]
        acc = tuple(jnp.zeros((launch.size, width), jnp.float32) for width in widths)
        acc = over_keys(launch, refs, tile, body, acc)
        gradient = [x * self.spec.scale for x in acc]
        if real is not None:
            gradient = [jnp.where(real[:, None], x, 0.0) for x in gradient]
        if "dquery" in refs:  # through the keys of other launches
            exists = tile.positions < refs["dquery"].shape[0]
            before = load_rows(refs["dquery"], tile.rows, exists)
            gradient = [x + y for x, y in zip(gradient, before, strict=True)]
        store_rows(dquery_ref, tile.rows, gradient, tile.valid)


def _rowsum(xs: list[Array], ys: list[Array], size: int) -> Array:
    """``rowsum(x * y)`` in float32, of arrays in head parts."""
    total = jnp.zeros((size,), jnp.float32)
    for x, y in zip(xs, ys, strict=True):
        total += (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=1)
    return total


def _add_gradient(
    spec: Spec,
    queries: list[Array],
    douts: list[Array],
    lse_log2: Array,
    delta: Array,
    interpret: bool,
    acc: tuple[Array, ...],
    keys: list[Array],
    values: list[Array],
    seen: Array | None,
) -> tuple[Array, ...]:
    """Adds the part of a tile of keys to dquery / scale, as `over_keys` calls it."""
    logits, factor, dcap = cap_logits(spec, inner(spec, queries, keys))
    weights = exp2_scaled(logits, factor, lse_log2[:, None], interpret=interpret)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    dlogits = weights * (inner(spec, douts, values) - delta[:, None])
    dlogits = (dlogits if dcap is None else dlogits * dcap).astype(queries[0].dtype)
    return tuple(x + dot(spec, dlogits, key) for x, key in zip(acc, keys, strict=True))
