"""Forward kernel in Pallas-Triton: one program a tile of queries.

The online softmax runs in base 2 and keeps ``LOWEST`` instead of -inf as the maximum of a query
that has seen no key, so that no difference of infinities arises.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._kernels import ForwardInputs
from pallas_kernels._logits import LOG2_E, LOWEST, cap_logits
from pallas_kernels._spec import Spec, State
from pallas_kernels._triton.blocks import (
    batch_block,
    dot,
    exp2_scaled,
    head_parts,
    inner,
    load_rows,
    load_vector,
    store_rows,
)
from pallas_kernels._triton.key_loop import over_keys
from pallas_kernels._triton.query_launch import QueryLaunch, QueryRows
from pallas_kernels._triton.tiles import TritonTiles
from pallas_kernels._varying import shape_like_varying

# Running maximum and sum of a row's softmax, and its weighted values in head parts.
_Sums = tuple[Array, ...]


def forward(
    spec: Spec,
    inputs: ForwardInputs,
    state: State | None,
    *,
    rows: tuple[int, int],
    resume: bool,
    out_dtype: jnp.dtype,
    tiles: TritonTiles,
    interpret: bool,
) -> State:
    """As `Kernels.forward`, by tiles of this size."""
    query, runs, sink_logits = inputs.query, inputs.runs, inputs.sink_logits
    batch, length, heads, _ = query.shape
    value_dim = runs[0].value.shape[-1]
    launch = QueryLaunch(spec, inputs, rows, tiles)
    shapes = (
        shape_like_varying(query, (batch, length, heads, value_dim), out_dtype),
        shape_like_varying(query, (batch, heads, length), jnp.float32),
    )
    out_blocks = (launch.head_block(shapes[0]), launch.lse_block(shapes[1]))
    arrays = {**launch.arrays, "query": query}
    blocks = {**launch.blocks, "query": launch.head_block(query)}
    if sink_logits is not None:
        arrays["sink_logits"], blocks["sink_logits"] = sink_logits, batch_block(sink_logits)
    # The state comes first, so that its leaves are the first operands, to be written in place.
    before = () if state is None else tuple(state)

    def kernel(before, refs, out_ref, lse_ref):
        tile = launch.query_rows(refs)
        queries = load_rows(refs["query"], tile.rows, tile.valid)
        if resume:
            sums = _resumed_sums(tile, *before)
        else:
            sums = _initial_sums(launch, value_dim, refs.get("sink_logits"))
        step = partial(softmax_step, spec, queries, interpret)
        _store(tile, over_keys(launch, refs, tile, step, sums), out_ref, lse_ref)

    out, lse = pl.pallas_call(
        kernel,
        grid=launch.grid,
        in_specs=[out_blocks[: len(before)], blocks],
        out_specs=list(out_blocks),
        out_shape=list(shapes),
        input_output_aliases={n: n for n in range(len(before))},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="ring_swa_forward",
    )(before, arrays)
    return State(out, lse)


def _initial_sums(launch: QueryLaunch, value_dim: int, sink_logits_ref: Any) -> _Sums:
    """The sums before any key, with the learned sink where there is one."""
    widths = [width for _, width in head_parts(value_dim)]
    acc = [jnp.zeros((launch.size, width), jnp.float32) for width in widths]
    row_max = jnp.full((launch.size,), LOWEST, jnp.float32)
    row_sum = jnp.zeros((launch.size,), jnp.float32)
    if sink_logits_ref is not None:
        learned = launch.head_values(sink_logits_ref)
        row_max = jnp.maximum(row_max, learned * LOG2_E)
        row_sum = jnp.where(learned > -jnp.inf, 1.0, row_sum)
    return row_max, row_sum, *acc


def _resumed_sums(tile: QueryRows, out_ref: Any, lse_ref: Any) -> _Sums:
    """The sums of the launches before, from the state that they left."""
    acc = [x.astype(jnp.float32) for x in load_rows(out_ref, tile.rows, tile.valid)]
    lse = load_vector(lse_ref, tile.flat, tile.valid)
    row_max = jnp.where(lse > -jnp.inf, lse * LOG2_E, LOWEST)
    row_sum = jnp.where(lse > -jnp.inf, np.float32(1), np.float32(0))
    return row_max, row_sum, *acc


def softmax_step(
    spec: Spec,
    queries: list[Array],
    interpret: bool,
    sums: _Sums,
    keys: list[Array],
    values: list[Array],
    seen: Array | None,
) -> _Sums:
    """One step of the online softmax, as `over_keys` calls it."""
    row_max, row_sum, *acc = sums
    logits, factor, _ = cap_logits(spec, inner(spec, queries, keys))
    if seen is not None:
        logits = jnp.where(seen, logits, -jnp.inf)
    new_max = jnp.maximum(row_max, logits.max(axis=1) * factor)
    rescale = jnp.exp2(row_max - new_max)
    weights = exp2_scaled(logits, factor, new_max[:, None], interpret=interpret)
    row_sum = row_sum * rescale + weights.sum(axis=1)
    weights = weights.astype(values[0].dtype)
    acc = [
        x * rescale[:, None] + dot(spec, weights, value)
        for x, value in zip(acc, values, strict=True)
    ]
    return new_max, row_sum, *acc


def _store(tile: QueryRows, sums: _Sums, out_ref: Any, lse_ref: Any) -> None:
    """Writes the output and log-sum-exp; zeros and -inf for a query without keys."""
    row_max, row_sum, *acc = sums
    has_keys = row_sum > 0
    inverse = jnp.where(has_keys, 1 / row_sum, 0.0)
    store_rows(out_ref, tile.rows, [x * inverse[:, None] for x in acc], tile.valid)
    lse = jnp.where(has_keys, row_max / LOG2_E + jnp.log(row_sum), -jnp.inf)
    plgpu.store(lse_ref.at[tile.flat], lse, mask=tile.valid)
