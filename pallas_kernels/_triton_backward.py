"""Backward kernels in Pallas-Triton: dquery by tiles of queries, dkey and dvalue by tiles of keys.

Both recompute the softmax from the log-sum-exp over all keys. dkey and dvalue loop over the
query heads of their group, so nothing is summed afterwards and no atomics are needed.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._band import fetched_sink_query_plan, query_plan, sees, sees_fetched_sink
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts, shape_like_varying
from pallas_kernels._tiles import TritonTiles
from pallas_kernels._triton_blocks import (
    LOG2_E,
    batch_block,
    cap_logits,
    dot,
    exp2_scaled,
    head_parts,
    inner,
    load_rows,
    load_vector,
    store_rows,
)
from pallas_kernels._triton_keys import KeyWalk


def backward_query(
    spec: Spec,
    query: Array,
    runs: tuple[KeyRun, ...],
    sinks: SinkRun | None,
    start: Starts,
    dout: Array,
    lse: Array,
    delta: Array,
    dquery: Array | None,
    *,
    rows: int,
    out_dtype: jnp.dtype,
    tiles: TritonTiles,
    interpret: bool,
) -> Array:
    """Gradient of the first ``rows`` queries, ``dquery`` of the first R of them added."""
    batch, _, heads, dim = query.shape
    walk = KeyWalk(spec, query, runs, sinks, start, (0, rows), tiles)
    shape = shape_like_varying(query, (batch, rows, heads, dim), out_dtype)
    arrays = {**walk.arrays, "query": query, "dout": dout, "lse": lse, "delta": delta}
    blocks = {
        **walk.blocks,
        "query": walk.head_block(query),
        "dout": walk.head_block(dout),
        "lse": walk.lse_block(lse),
        "delta": walk.lse_block(delta),
    }
    if dquery is not None:
        arrays["dquery"], blocks["dquery"] = dquery, walk.head_block(dquery)

    def kernel(refs, out_ref):
        tile = walk.query_tile(refs)
        at = (tile.begin, tiles.query, tile.valid)
        queries, douts = load_rows(refs["query"], *at), load_rows(refs["dout"], *at)
        top, delta = _softmax_rows(refs, at)

        def visit(acc, keys, values, seen):
            logits, factor, dcap = cap_logits(spec, inner(spec, queries, keys))
            weights = exp2_scaled(logits, factor, top[:, None], interpret=interpret)
            if seen is not None:
                weights = jnp.where(seen, weights, 0.0)
            dlogits = weights * (inner(spec, douts, values) - delta[:, None])
            dlogits = (dlogits if dcap is None else dlogits * dcap).astype(query.dtype)
            return tuple(x + dot(spec, dlogits, key) for x, key in zip(acc, keys, strict=True))

        acc = tuple(jnp.zeros((tiles.query, width), jnp.float32) for _, width in head_parts(dim))
        total = [x * spec.scale for x in walk.fold(refs, tile, visit, acc)]
        if dquery is not None:
            before = load_rows(
                refs["dquery"], tile.begin, tiles.query, tile.positions < dquery.shape[1]
            )
            total = [x + y for x, y in zip(total, before, strict=True)]
        store_rows(out_ref, tile.begin, total, tile.valid)

    return pl.pallas_call(
        kernel,
        grid=walk.grid,
        in_specs=[blocks],
        out_specs=walk.head_block(shape),
        out_shape=shape,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="ring_swa_backward_query",
    )(arrays)


def backward_keys(
    spec: Spec,
    query: Array,
    keys: tuple[Array, Array],
    offset: int | None,
    start: Starts,
    dout: Array,
    lse: Array,
    delta: Array,
    *,
    rows: int,
    out_dtype: jnp.dtype,
    tiles: TritonTiles,
    splits: int,
    wanted: tuple[bool, bool],
    interpret: bool,
) -> list[Array]:
    """Gradients of the keys and values of a run through the first ``rows`` queries.

    Args:
        spec: static settings.
        query: all queries.
        keys: keys and values of the run.
        offset: position of the first key; None for fetched sinks.
        start: where the sequence of each query starts.
        dout: cotangent of the output.
        lse: log-sum-exp over all keys.
        delta: ``sum(out * dout)``.
        rows: number of queries.
        out_dtype: of the gradients.
        tiles: tile sizes.
        splits: number of programs that share the queries of a tile of keys.
        wanted: which of dkey and dvalue to compute.
        interpret: run in the interpreter.

    Returns:
        The wanted gradients, [splits, B, S, K, H] to be summed over the first axis.
    """
    batch, _, heads, _ = query.shape
    _, length, num_kv, _ = keys[0].shape
    group = heads // num_kv
    num_tiles = -(-length // tiles.key)
    packed = start.ndim > 0
    sizes = {"rows": rows, "query_tile": tiles.query, "length": length, "key_tile": tiles.key}
    if offset is None:
        assert spec.window is not None
        plan = fetched_sink_query_plan(start, spec.window, **sizes)
    else:
        num_sinks = spec.sinks_in(offset)
        plan = query_plan(start, spec.window, num_sinks, offset=offset, **sizes)
    arrays = {
        "start": start if packed else start.reshape(1, 1),
        "plan": plan if packed else plan[None],
        "keys": keys,
        "query": query,
        "dout": dout,
        "lse": lse,
        "delta": delta,
    }

    def head_block(x, heads=None):
        block = (None, x.shape[1], heads, x.shape[3])
        return pl.BlockSpec(block, lambda t, n, b: (b, 0, n, 0))

    row_block = pl.BlockSpec((None, group, lse.shape[2]), lambda t, n, b: (b, n, 0))
    blocks = {
        "start": batch_block(arrays["start"]),
        "plan": batch_block(arrays["plan"]),
        "keys": tuple(head_block(x) for x in keys),
        "query": head_block(query, group),
        "dout": head_block(dout, group),
        "lse": row_block,
        "delta": row_block,
    }
    shapes = [
        shape_like_varying(query, (splits, *x.shape), out_dtype)
        for x, want in zip(keys, wanted, strict=True)
        if want
    ]
    out_blocks = [
        pl.BlockSpec(
            (None, None, length, None, x.shape[-1]),
            lambda t, n, b: (lax.rem(t, splits), b, 0, n, 0),
        )
        for x in shapes
    ]

    def kernel(refs, *out_refs):
        index = lax.div(pl.program_id(0), splits)
        split = lax.rem(pl.program_id(0), splits)
        first_key = index * tiles.key
        local = first_key + jnp.arange(tiles.key, dtype=jnp.int32)
        exists = local < length if length % tiles.key else None
        key, value = (load_rows(ref, first_key, tiles.key, exists) for ref in refs["keys"])
        crossing = refs["start"][0]

        def seen_by(i, start):
            j = (crossing if offset is None else offset) + local[:, None]
            if offset is None:
                return sees_fetched_sink(i, j, start, spec.window, spec.num_sinks)
            return sees(i, j, start, spec.window, num_sinks, packed=packed)

        def visit(t, head, acc, masked):
            begin = t * tiles.query
            positions = begin + jnp.arange(tiles.query, dtype=jnp.int32)
            valid = positions < rows if masked and rows % tiles.query else None
            at = (begin, tiles.query, valid)
            queries = load_rows(refs["query"], *at, head=head)
            douts = load_rows(refs["dout"], *at, head=head)
            top, delta = _softmax_rows(refs, at, head=head)
            logits, factor, dcap = cap_logits(spec, inner(spec, key, queries))
            weights = exp2_scaled(logits, factor, top[None, :], interpret=interpret)
            if masked:
                start = load_vector(refs["start"], *at)[None, :] if packed else crossing
                seen = seen_by(positions[None, :], start)
                seen = seen if valid is None else seen & valid[None, :]
                weights = jnp.where(seen, weights, 0.0)
            dkey, dvalue = acc
            if wanted[0]:
                dlogits = weights * (inner(spec, value, douts) - delta[None, :])
                dlogits = (dlogits if dcap is None else dlogits * dcap).astype(query.dtype)
                dkey = tuple(x + dot(spec, dlogits, q) for x, q in zip(dkey, queries, strict=True))
            if wanted[1]:
                weights = weights.astype(query.dtype)
                dvalue = tuple(
                    x + dot(spec, weights, d) for x, d in zip(dvalue, douts, strict=True)
                )
            return dkey, dvalue

        acc = tuple(
            tuple(jnp.zeros((tiles.key, width), jnp.float32) for _, width in head_parts(dim))
            if want
            else ()
            for want, dim in zip(wanted, (key_dim, value_dim), strict=True)
        )

        def over(begin, end, acc, masked):
            """Visits the tiles of all heads of the group in one loop."""
            count = jnp.maximum(end - begin, 1)

            def step(n, acc):
                head = lax.div(n, count)
                return visit(begin + n - head * count, head, acc, masked)

            return lax.fori_loop(0, (end - begin) * group, step, acc)

        if offset is None:
            begin, end = refs["plan"][index, 0], refs["plan"][index, 1]
            share = lax.div(end - begin + splits - 1, splits)
            begin = jnp.minimum(begin + split * share, end)
            acc = over(begin, jnp.minimum(begin + share, end), acc, True)
        else:
            begin, clear_begin, clear_end, end = (refs["plan"][index, n] for n in range(4))
            if tiles.clear:
                acc = over(begin, clear_begin, acc, True)
                acc = over(clear_begin, clear_end, acc, False)
                acc = over(clear_end, end, acc, True)
            else:
                acc = over(begin, end, acc, True)
        dkey = [x * spec.scale for x in acc[0]]
        results = [x for x, want in zip((dkey, list(acc[1])), wanted, strict=True) if want]
        for out_ref, result in zip(out_refs, results, strict=True):
            store_rows(out_ref, first_key, result, exists)

    key_dim, value_dim = (x.shape[-1] for x in keys)
    return pl.pallas_call(
        kernel,
        grid=(num_tiles * splits, num_kv, batch),
        in_specs=[blocks],
        out_specs=out_blocks,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="ring_swa_backward_keys",
    )(arrays)


def _softmax_rows(refs, at, head=None):
    """Log-sum-exp in base 2 (0 for a query without keys) and delta of a tile of queries."""
    lse = load_vector(refs["lse"], *at, head=head)
    top = jnp.where(lse > -jnp.inf, lse * LOG2_E, 0.0)
    return top, load_vector(refs["delta"], *at, head=head)
