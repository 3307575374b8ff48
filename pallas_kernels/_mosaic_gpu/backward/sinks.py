"""Backward kernel in Mosaic GPU, for Hopper, for the sinks that windows do not reach.

It comes after the fused kernel and finishes the gradients of queries, of which it reads and writes
every tile anyway. A program has a chunk of the queries of one head. The chunk is no longer than a
window, so that all of its queries that see sinks beyond their windows are of the sequence of its
first query. What a chunk adds to the gradients of its sinks is kept, in float32, and added up in a
fixed order.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._kernels import Queries
from pallas_kernels._masks import sees_beyond_window
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import Finish, Total
from pallas_kernels._mosaic_gpu.backward.softmax import (
    of_queries,
    part_width,
    sums_of_logits,
    weigh,
    write_parts,
)
from pallas_kernels._mosaic_gpu.primitives import (
    MATRIX,
    ROW,
    ROWS,
    across,
    fori,
    fresh,
    load,
    swizzled,
    zeros,
)
from pallas_kernels._spec import KeyRun, SinkRun, Spec
from pallas_kernels._varying import vary_as

CHUNK = 512
"""Queries of a program at most: enough programs for a GPU, and few partial results."""


MOST_COLUMNS = 256
"""Of gradients of keys and values together, for the registers of a warpgroup; else one by one."""


MOST_SINKS = ROWS
"""Sinks of a sequence at most: what a warpgroup has rows."""


SHORTEST_WINDOW = ROWS - 1
"""A chunk has at least a tile of queries."""


def backward(
    spec: Spec,
    queries: Queries,
    run: KeyRun,
    sinks: SinkRun | None,
    total: Total,
    dquery: Array | None,
    dkey: Array,
    dvalue: Array,
    *,
    dquery_dtype: jnp.dtype,
) -> tuple[Array, Array, Array, SinkRun | None]:
    """Adds what flows through the sinks that windows do not reach to gradients.

    Args:
        spec: static settings.
        queries: queries of the shard, and what belongs to them.
        run: its own keys.
        sinks: sinks fetched from other shards, or None.
        total: gradients of queries through the keys in their windows.
        dquery: more gradients of the first queries, or None.
        dkey: gradients of the shard's keys through windows, in float32.
        dvalue: those of values.
        dquery_dtype: of the returned gradients of queries.

    Returns:
        dquery, dkey, dvalue, and the gradients of the fetched sinks.
    """
    assert spec.window is not None
    batch, length, heads, _ = queries.query.shape
    start = queries.start
    num_kv = run.key.shape[2]
    chunk = chunk_length(spec.window)
    starts = start[:, ::chunk] if start.ndim else start
    starts = jnp.broadcast_to(starts, (batch, -(-length // chunk)))
    found = sinks_of_chunks(spec.num_sinks, starts, run, sinks)
    dquery, *parts = _by_chunks(
        spec, queries, found, starts, total, dquery, dquery_dtype, fetched=sinks is not None
    )

    def of_kv_heads(x):
        """[B, chunks, sinks, K, H]: heads of a group share their sinks."""
        x = x[..., : spec.num_sinks, :]
        x = x.reshape(*x.shape[:2], num_kv, heads // num_kv, *x.shape[3:]).sum(3)
        return jnp.moveaxis(x, 3, 2)

    dkey_parts, dvalue_parts = map(of_kv_heads, parts)
    dkey = add_to_own(dkey, dkey_parts, starts, chunk)
    dvalue = add_to_own(dvalue, dvalue_parts, starts, chunk)
    dsinks = None
    if sinks is not None:
        dsinks = SinkRun(of_fetched(dkey_parts, starts), of_fetched(dvalue_parts, starts))
    return dquery, dkey, dvalue, dsinks


def takes(spec: Spec) -> bool:
    """Whether the kernel can compute this."""
    return (
        spec.window is not None and spec.window >= SHORTEST_WINDOW and spec.num_sinks <= MOST_SINKS
    )


def chunk_length(window: int) -> int:
    """Queries of a chunk: whole tiles, no longer than a window of ``window`` and a query's own."""
    return min(CHUNK, (window + 1) // ROWS * ROWS)


def sinks_of_chunks(
    num_sinks: int, starts: Array, run: KeyRun, sinks: SinkRun | None
) -> tuple[Array, Array]:
    """Keys and values of the sinks of the sequences that start at ``starts``, [B, chunks].

    Returns:
        [B, chunks, K, `ROWS`, H], zeros where there is no sink.
    """
    slots = jnp.arange(ROWS, dtype=jnp.int32)
    positions = starts[..., None] + slots
    length = run.key.shape[1]
    own = (slots < num_sinks) & (positions >= 0) & (positions < length)

    def gather(x, fetched):
        rows = jnp.clip(positions, 0, length - 1)
        result = jnp.where(own[..., None, None], jax.vmap(lambda x, n: x[n])(x, rows), 0)
        if fetched is not None:
            before = (positions < 0) & (slots < fetched.shape[1])
            pad = ((0, 0), (0, max(0, ROWS - fetched.shape[1])), (0, 0), (0, 0))
            # Fetched sinks hold values of the keys' dtype, so this cast loses nothing.
            fetched = jnp.pad(fetched.astype(x.dtype), pad)[:, None, :ROWS]
            result = jnp.where(before[..., None, None], fetched, result)
        return jnp.moveaxis(result, 3, 2)

    key, value = (None, None) if sinks is None else sinks
    return gather(run.key, key), gather(run.value, value)


def add_to_own(gradients: Array, parts: Array, starts: Array, chunk: int) -> Array:
    """Adds what chunks leave to the gradients of the shard's own keys that are their sinks.

    Args:
        gradients: [B, S, K, H].
        parts: [B, chunks, sinks, K, H], nothing in those of sinks that no query of the chunk sees
            beyond its window.
        starts: [B, chunks].
        chunk: queries of a chunk.
    """
    batch, chunks, num_sinks = parts.shape[:3]
    length = gradients.shape[1]

    def add(earlier, later):
        start, total = earlier
        same = start == later[0]
        return later[0], jnp.where(same[..., None, None, None], total + later[1], later[1])

    _, totals = lax.associative_scan(add, (starts, parts), axis=1)
    ends = jnp.concatenate((starts[:, 1:] != starts[:, :-1], jnp.ones((batch, 1), bool)), axis=1)
    positions = starts[..., None] + jnp.arange(num_sinks, dtype=jnp.int32)
    # Sinks that are seen beyond a window stand before the chunk, so that these rows differ.
    first = jnp.arange(chunks, dtype=jnp.int32)[:, None] * chunk
    there = ends[..., None] & (positions >= 0) & (positions < first)
    nowhere = length + jnp.arange(chunks * num_sinks, dtype=jnp.int32)
    rows = jnp.where(there.reshape(batch, -1), positions.reshape(batch, -1), nowhere)
    totals = totals.reshape(batch, chunks * num_sinks, *parts.shape[3:])

    def to_rows(x, rows, totals):
        return x.at[rows].add(totals, mode="drop", unique_indices=True)

    return jax.vmap(to_rows)(gradients, rows, totals)


def of_fetched(parts: Array, starts: Array) -> Array:
    """What chunks, as in `add_to_own`, leave to the fetched sinks: [B, sinks, K, H]."""
    slots = jnp.arange(parts.shape[2], dtype=jnp.int32)
    fetched = (starts == starts[:, :1])[..., None] & (starts[..., None] + slots < 0)
    return jnp.where(fetched[..., None, None], parts, 0).sum(1)


def _by_chunks(
    spec, queries: Queries, found, starts, total, dquery, dquery_dtype, *, fetched
) -> tuple[Array, Array, Array]:
    """Finished gradients of queries, and [B, chunks, N, rows, H] of sinks, in float32."""
    query, dout, lse, delta, start = queries
    batch, length, heads, dim = query.shape
    group = heads // found[0].shape[2]
    value_dim, dtype = found[1].shape[4], query.dtype
    packed = start.ndim > 0
    work = Finish(total, dquery, scale=spec.scale, rows=length, dtype=dquery_dtype)
    tiles, chunks, size = work.tiles, starts.shape[1], chunk_length(spec.window) // ROWS
    kept, widths = -(-spec.num_sinks // 8) * 8, {"dkey": dim, "dvalue": value_dim}
    operands: dict[str, Any] = {
        **work.operands,
        "query": query,
        "dout": dout,
        **of_queries(spec, lse, delta, tiles * ROWS),
        "key": found[0],
        "value": found[1],
        "starts": starts,
    }
    if packed:
        operands["start"] = jnp.pad(start, ((0, 0), (0, -length % ROWS)), mode="edge")
    outputs = {
        "out": work.out_type,
        "dkey": jax.ShapeDtypeStruct((batch, chunks, heads, kept, dim), jnp.float32),
        "dvalue": jax.ShapeDtypeStruct((batch, chunks, heads, kept, value_dim), jnp.float32),
    }

    def compute(refs, smem, dquery_smem, barriers):
        index = lax.axis_index("program")
        head = lax.rem(index, jnp.int32(heads))
        index = lax.div(index, jnp.int32(heads))
        number, row = lax.rem(index, jnp.int32(chunks)), lax.div(index, jnp.int32(chunks))
        begin, end = number * size, jnp.minimum(number * size + size, tiles)
        first_sink = refs["starts"][row, number]
        for name in ("key", "value"):
            source = refs[name].at[row, number, lax.div(head, jnp.int32(group))]
            plgpu.copy_gmem_to_smem(source, smem[name], barriers["key"])
        plgpu.barrier_wait(barriers["key"])

        # The first tile whose last query may see a sink beyond its window.
        reached = lax.div(jnp.maximum(first_sink + spec.window + 1, 0), jnp.int32(ROWS))
        reached = jnp.clip(reached, begin, end)

        def fetch(tile):
            where = pl.ds(tile * ROWS, ROWS)
            for name in ("query", "dout"):
                source = refs[name].at[row, where, head]
                plgpu.copy_gmem_to_smem(source, smem[name], barriers["query"])
            for name in ("shift", "delta"):
                source = refs[name].at[row, head, where]
                plgpu.copy_gmem_to_smem(source, smem[name], barriers["query"])
            if packed:
                source = refs["start"].at[row, where]
                plgpu.copy_gmem_to_smem(source, smem["start"], barriers["query"])

        def visit(wanted, tile, sums):
            plgpu.barrier_wait(barriers["query"])
            shift = across(load(smem["shift"], ROW))
            delta = across(load(smem["delta"], ROW))

            def mask(weights):
                j = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=MATRIX)
                i = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1, layout=MATRIX)
                i, j = i * fresh(1) + tile * ROWS, j + first_sink
                starts = across(load(smem["start"], ROW)) if packed else first_sink
                seen = sees_beyond_window(i, j, starts, spec.window, spec.num_sinks)
                if not fetched:
                    seen &= j >= 0
                return jnp.where(seen, weights, 0.0)

            def accumulate(refs):
                *sums, logits, dweights = refs
                into = dict(zip(wanted, sums, strict=True))
                plgpu.wgmma(logits, smem["key"], smem["query"].T)
                plgpu.wgmma(dweights, smem["value"], smem["dout"].T)
                clear = jnp.bool_(False)
                weights, dlogits = weigh(spec, logits, dweights, shift, clear, mask, dtype)
                if "dvalue" in wanted:
                    plgpu.wgmma(into["dvalue"], weights, smem["dout"])
                if "dkey" in wanted:
                    plgpu.wgmma(into["dkey"], dlogits, smem["query"])
                    smem["dlogits"].at[fresh(0)][...] = dlogits
                plgpu.wgmma_wait(0)

            sums = *sums, sums_of_logits(spec, shift), delta
            return pl.run_state(accumulate)(tuple(map(plgpu.ACC.init, sums)))[:-2]

        def finish(tile, through_sinks):
            plgpu.commit_smem()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            here = refs, dquery_smem, row, tile, head
            for part in range(work.parts):
                result = work.load(refs, row, tile, head, part)
                work.put(*here, part, through_sinks(part, result))
            work.send(*here)

        def through_sinks(part, result):
            def multiply(result):
                columns = pl.ds(part * work.columns, work.columns)
                plgpu.wgmma(result, smem["dlogits"].at[0].T, smem["key"].at[:, columns])
                plgpu.wgmma_wait(0)

            return pl.run_state(multiply)(plgpu.ACC.init(result))

        def walk(wanted):
            def step(tile, sums):
                sums = visit(wanted, tile, sums)
                # Both commit and so wait for all warps, which have then left this tile's shared
                # memory: the next one may be fetched.
                if "dkey" in wanted:
                    finish(tile, through_sinks)
                else:
                    plgpu.commit_smem()

                @pl.when(tile + 1 < end)
                def fetch_next():
                    fetch(tile + 1)

                return sums

            pl.when(reached < end)(lambda: fetch(reached))
            if "dkey" in wanted:
                fori(begin, reached, lambda tile, _: finish(tile, lambda _, x: x), None)
            sums = fori(reached, end, step, tuple(zeros(widths[name]) for name in wanted))
            for name, result in zip(wanted, sums, strict=True):

                def there(column, width, ref=refs[name]):
                    return ref.at[row, number, head, pl.ds(0, kept), pl.ds(column, width)]

                factor = spec.scale if name == "dkey" else 1.0
                write_parts(result * factor, smem["parts"], there, rows=kept)

        if dim + value_dim <= MOST_COLUMNS:
            walk(("dkey", "dvalue"))
        else:
            walk(("dkey",))
            walk(("dvalue",))
        plgpu.wait_smem_to_gmem(0)

    smem = {
        "key": swizzled((ROWS, dim), dtype, columns=work.columns),
        "value": swizzled((ROWS, value_dim), dtype),
        "query": swizzled((ROWS, dim), dtype, columns=work.columns),
        "dout": swizzled((ROWS, value_dim), dtype),
        "shift": plgpu.SMEM((ROWS,), jnp.float32),
        "delta": plgpu.SMEM((ROWS,), jnp.float32),
        "dlogits": swizzled((1, ROWS, ROWS), dtype, columns=work.columns),
        "parts": plgpu.SMEM((ROWS, part_width(jnp.float32, dim, value_dim)), jnp.float32),
    }
    barriers = {
        "key": plgpu.Barrier(num_arrivals=2),
        "query": plgpu.Barrier(num_arrivals=5 if packed else 4),
    }
    if packed:
        smem["start"] = plgpu.SMEM((ROWS,), jnp.int32)

    def ring_swa_backward_sinks(*refs):
        inputs = dict(zip((*operands, *outputs), refs, strict=True))
        pl.run_scoped(partial(compute, inputs), smem, work.smem, barriers)

    results = plgpu.kernel(
        ring_swa_backward_sinks,
        out_type=tuple(outputs.values()),
        grid=(batch * chunks * heads,),
        grid_names=("program",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*operands.values())
    # Kernels of Mosaic GPU know nothing of manual mesh axes.
    dquery, dkey, dvalue = (vary_as(query, x) for x in results)
    return work.whole(dquery), dkey, dvalue
