"""Backward kernel in Mosaic GPU, for Hopper: all gradients in one walk over tiles of queries.

A program walks as `pallas_kernels._mosaic_key_walk` says. Each of its two warpgroups computes on
half of the tile's keys, and keeps the gradients of these keys and values in registers. They
exchange the gradients of logits, so that each computes half of the columns of the gradients of
queries.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward import dq_postprocess
from pallas_kernels._mosaic_gpu.backward.dkv_reduce import hand_over
from pallas_kernels._mosaic_gpu.backward.dq_accumulate import PLACES, add_tiles
from pallas_kernels._mosaic_gpu.backward.pipeline import KeyWalk
from pallas_kernels._mosaic_gpu.backward.scheduler import QUERIES, fold, slot_of
from pallas_kernels._mosaic_gpu.backward.softmax import (
    part_width,
    sums_of_logits,
    weigh,
    write_parts,
)
from pallas_kernels._mosaic_gpu.primitives import (
    ROW,
    ROWS,
    across,
    fresh,
    load,
    release_smem,
    swizzled,
    zeros,
)
from pallas_kernels._spec import KeyRun, Spec

KEYS = 2 * ROWS
"""Keys of a tile: what two warpgroups have rows."""


SLOTS = PLACES
"""Tiles of queries in shared memory, and of their gradients."""


def backward(
    spec: Spec,
    queries: Queries,
    run: KeyRun,
    *,
    rows: int,
    dkey_dtype: jnp.dtype,
    processors: int,
    ordered: bool,
    dquery_dtype: jnp.dtype | None = None,
) -> tuple[dq_postprocess.Total | Array, Array, Array]:
    """Gradients through the first ``rows`` queries and the keys of a run that windows reach.

    Unless ``ordered``, the gradients of queries are added up in any order. If so, and if these are
    all queries and the run has the shard's own keys, they may be finished too, that is, rounded to
    ``dquery_dtype``.

    Returns:
        dquery, to be finished unless its dtype is given; dkey; dvalue.
    """
    query = queries.query
    dim, value_dim, dtype = query.shape[3], run.value.shape[3], query.dtype
    half = dim // 2
    rounding = None
    if dquery_dtype is not None:
        rounding = dq_postprocess.Rounding(
            scale=spec.scale, shape=query.shape, columns=half, dtype=dquery_dtype
        )
    walk = KeyWalk(
        spec,
        queries,
        run,
        rows=rows,
        key_tile=KEYS,
        columns=half,
        processors=processors,
        ordered=ordered,
        rounding=rounding,
    )
    packed = walk.packed

    def dquery_refs(smem):
        """Where a program leaves its sums for queries, and where results, in the same memory."""
        return (smem["dquery"], None) if rounding is None else smem["dquery"]

    def compute(refs, smem, barriers, me):
        # At first all shared memory is free.
        plgpu.barrier_arrive(barriers["dlogits_free"])
        for slot in range(SLOTS):
            plgpu.barrier_arrive(barriers["query_free"].at[slot])
        path = walk.path(refs)
        row, kv_head, tile = path.row, path.kv_head, path.tile
        first_key = tile * KEYS + me * ROWS + run.offset
        mine = pl.ds(me * ROWS, ROWS)
        sums_smem, rounded_smem = dquery_refs(smem)

        def close(rounding, slot, block, result):
            """Leaves gradients of queries rounded, with those before them added."""
            place = sums_smem.at[slot, me]
            total = lax.cond(
                path.before(block) > 0,
                lambda x: x + register_tiles.load(place, half),
                lambda x: x,
                result,
            )
            plgpu.commit_smem()  # all warps have read what the result is written over
            rounded_smem.at[slot, me, 0][...] = rounding.result(total)

        def leave(slot, block, result):
            """Leaves gradients of queries in shared memory."""
            store = partial(register_tiles.store, sums_smem.at[slot, me], result)
            if rounding is None:
                store()
            else:
                pl.when(path.is_last(block))(partial(close, rounding, slot, block, result))
                pl.when(~path.is_last(block))(store)
            release_smem()

        def step(head, block, number, carry):
            del head
            dkey, dvalue = carry
            clear = path.is_clear(block)
            slot = slot_of(number, SLOTS)
            plgpu.barrier_wait(barriers["query"].at[slot])
            query_smem, dout_smem = smem["query"].at[slot], smem["dout"].at[slot]
            here = pl.ds(fresh(me) * ROWS, ROWS)
            shift = across(load(smem["shift"].at[slot], ROW))
            delta = across(load(smem["delta"].at[slot], ROW))
            starts = smem["start"].at[slot] if packed else None
            masked = partial(walk.mask, starts, first_key, block)

            def accumulate(refs):
                dkey, dvalue, logits, dweights = refs
                plgpu.wgmma(logits, smem["key"].at[here], query_smem.T)
                plgpu.wgmma(dweights, smem["value"].at[here], dout_smem.T)
                weights, dlogits = weigh(spec, logits, dweights, shift, clear, masked, dtype)
                plgpu.wgmma(dvalue, weights, dout_smem)
                plgpu.barrier_wait(barriers["dlogits_free"])
                smem["dlogits"].at[mine][...] = dlogits
                release_smem()
                plgpu.barrier_arrive(barriers["dlogits"])
                plgpu.barrier_wait(barriers["dlogits"])

                def multiply(dquery):
                    columns = pl.ds(fresh(me) * half, half)
                    plgpu.wgmma(dquery, smem["dlogits"].T, smem["key"].at[:, columns])
                    plgpu.wgmma(dkey, dlogits, query_smem)
                    result = plgpu.wgmma_accumulator_load(dquery, wait_n=1)
                    plgpu.barrier_arrive(barriers["dlogits_free"])
                    plgpu.barrier_wait(barriers["dquery_free"].at[slot])
                    leave(slot, block, result)
                    plgpu.barrier_arrive(barriers["dquery"].at[slot])

                pl.run_scoped(multiply, plgpu.ACC((QUERIES, half), jnp.float32))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(barriers["query_free"].at[slot])

            sums = dkey, dvalue, sums_of_logits(spec, shift), delta
            return pl.run_state(accumulate)(tuple(map(plgpu.ACC.init, sums)))[:2]

        plgpu.barrier_wait(barriers["key"])
        dkey, dvalue = fold(path, step, (zeros(dim), zeros(value_dim)))

        def write(results):
            (dkey,), (dvalue,) = results["dkey"], results["dvalue"]
            where = (row, pl.ds(tile * KEYS + me * ROWS, ROWS), kv_head)
            for name, result in (("dvalue", dvalue), ("dkey", dkey * spec.scale)):

                def there(column, width, ref=refs[name]):
                    return ref.at[(*where, pl.ds(column, width))]

                write_parts(result, smem["out"].at[me], there)
            plgpu.wait_smem_to_gmem(0)

        hand_over(path, refs, me, me, {"dkey": (dkey,), "dvalue": (dvalue,)}, write)

    smem = {
        "key": swizzled((KEYS, dim), dtype, columns=half),
        "value": swizzled((KEYS, value_dim), dtype),
        "query": swizzled((SLOTS, QUERIES, dim), dtype, columns=half),
        "dout": swizzled((SLOTS, QUERIES, value_dim), dtype),
        "shift": plgpu.SMEM((SLOTS, QUERIES), jnp.float32),
        "delta": plgpu.SMEM((SLOTS, QUERIES), jnp.float32),
        "dlogits": swizzled((KEYS, QUERIES), dtype, columns=half),
        "dquery": plgpu.SMEM((SLOTS, *walk.dquery_tile), jnp.float32),
        "out": swizzled((2, ROWS, part_width(dkey_dtype, dim, value_dim)), dkey_dtype),
    }
    if rounding is not None:
        # As many bytes in each place as its sums have, so that each is in the memory of its own.
        most = jnp.dtype(jnp.float32).itemsize // jnp.dtype(rounding.dtype).itemsize
        rounded = swizzled((SLOTS, 2, most, ROWS, half), rounding.dtype)
        smem["dquery"] = plgpu.RefUnion(smem["dquery"], rounded)
    fetched = ["query", "dout", "shift", "delta"]
    if packed:
        smem["start"] = plgpu.SMEM((SLOTS, QUERIES), jnp.int32)
        fetched.append("start")
    barriers = {
        "key": plgpu.Barrier(num_arrivals=2),
        "query": plgpu.Barrier(num_arrivals=len(fetched), num_barriers=SLOTS),
        "query_free": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        "dlogits": plgpu.Barrier(num_arrivals=2),
        "dlogits_free": plgpu.Barrier(num_arrivals=2),
        "dquery": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        "dquery_free": plgpu.Barrier(num_barriers=SLOTS),
    }

    def add(refs, smem, barriers):
        sums_smem, rounded_smem = dquery_refs(smem)
        add_tiles(walk, refs, sums_smem, rounded_smem, barriers)

    dquery, dkey, dvalue = walk.launch(
        compute,
        partial(walk.fetch, slots={"query": SLOTS}, names={"query": fetched}),
        add,
        smem,
        barriers,
        dkey_dtype,
    )
    if rounding is None:
        return dq_postprocess.Total(dquery, walk.seen), dkey, dvalue
    return dquery, dkey, dvalue
