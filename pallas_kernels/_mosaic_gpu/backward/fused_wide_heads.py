"""Backward kernel in Mosaic GPU, for Hopper and heads of 192 and 256: all gradients in one walk.

A program walks as `pallas_kernels._mosaic_key_walk` says. The gradients of its keys and those of
its values fill the registers of a warpgroup each. So one warpgroup computes weights and the
gradients of values, the other one takes the weights over, in float32, and computes the gradients of
logits and keys. Both compute gradients of queries, by parts of their columns.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._kernels import Queries
from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward import dq_postprocess
from pallas_kernels._mosaic_gpu.backward.dkv_reduce import WIDEST, hand_over
from pallas_kernels._mosaic_gpu.backward.dq_accumulate import add_parts
from pallas_kernels._mosaic_gpu.backward.pipeline import KeyWalk
from pallas_kernels._mosaic_gpu.backward.scheduler import QUERIES, fold, slot_of
from pallas_kernels._mosaic_gpu.backward.softmax import sums_of_logits, weights_of, write_parts
from pallas_kernels._mosaic_gpu.primitives import (
    ROW,
    ROWS,
    across,
    load,
    release_smem,
    swizzled,
    zeros,
)
from pallas_kernels._spec import KeyRun, Spec

KEYS = ROWS
"""Keys of a tile."""


COLUMNS = 64
"""Columns of a part of the gradients of queries."""


WIDTH = WIDEST
"""Columns of a part of the gradients of keys and values at most: a product needs registers."""


SLOTS = 2
"""Tiles of queries in shared memory; there is one of the gradients of outputs."""


def backward(
    spec: Spec,
    queries: Queries,
    run: KeyRun,
    *,
    rows: int,
    dkey_dtype: jnp.dtype,
    processors: int,
    ordered: bool,
) -> tuple[dq_postprocess.Total, Array, Array]:
    """As `pallas_kernels._mosaic_gpu.backward.fused.backward`."""
    query = queries.query
    dim, value_dim, dtype = query.shape[3], run.value.shape[3], query.dtype
    walk = KeyWalk(
        spec,
        queries,
        run,
        rows=rows,
        key_tile=KEYS,
        columns=COLUMNS,
        processors=processors,
        ordered=ordered,
    )
    packed, parts = walk.packed, dim // COLUMNS

    def compute(refs, smem, barriers, me):
        path = walk.path(refs)
        # At first all shared memory is free.
        plgpu.barrier_arrive(barriers["dlogits_free"])
        plgpu.barrier_arrive(barriers["dout_free"].at[0])
        for slot in range(SLOTS):
            plgpu.barrier_arrive(barriers["query_free"].at[slot])

        def sum_dquery(mine):
            """Computes the warpgroup's parts of the gradients of queries."""

            def multiply(part, dquery):
                columns = pl.ds(part * COLUMNS, COLUMNS)
                plgpu.wgmma(dquery, smem["dlogits"].T, smem["key"].at[:, columns])
                result = plgpu.wgmma_accumulator_load(dquery)
                if part + 2 >= parts:
                    plgpu.barrier_arrive(barriers["dlogits_free"])
                plgpu.barrier_wait(barriers["dquery_free"].at[mine])
                register_tiles.store(smem["dquery"].at[mine, 0], result)
                release_smem()
                plgpu.barrier_arrive(barriers["dquery"].at[mine])

            for part in range(mine, parts, 2):
                accumulator = plgpu.ACC((QUERIES, COLUMNS), jnp.float32)
                pl.run_scoped(partial(multiply, part), accumulator)

        def write(name, scale, results):
            row, kv_head, tile = path.row, path.kv_head, path.tile
            for n, result in enumerate(results[name]):

                def there(column, width, first=n * WIDTH):
                    columns = pl.ds(first + column, width)
                    return refs[name].at[row, pl.ds(tile * ROWS, ROWS), kv_head, columns]

                write_parts(result * scale, smem["out"].at[me], there)
            plgpu.wait_smem_to_gmem(0)

        def leave(name, results, scale):
            hand_over(path, refs, me, 0, {name: results}, partial(write, name, scale))

        @pl.when(me == 0)
        def through_values():
            first_key = path.tile * ROWS + run.offset

            def step(head, block, number, dvalues):
                del head
                clear = path.is_clear(block)
                slot = slot_of(number, SLOTS)
                plgpu.barrier_wait(barriers["query"].at[slot])
                shift = across(load(smem["shift"].at[slot], ROW))
                starts = smem["start"].at[slot] if packed else None

                def accumulate(refs):
                    *dvalues, logits = refs
                    plgpu.wgmma(logits, smem["key"], smem["query"].at[slot].T)
                    masked = partial(walk.mask, starts, first_key, block)
                    products = plgpu.wgmma_accumulator_load(logits)
                    weights, factors = weights_of(spec, products, shift, clear, masked)
                    plgpu.barrier_arrive(barriers["query_free"].at[slot])
                    plgpu.barrier_wait(barriers["factors_free"])
                    register_tiles.store(smem["factors"], factors)
                    plgpu.barrier_arrive(barriers["factors"])
                    plgpu.barrier_wait(barriers["dout"].at[0])
                    multiply_add(dvalues, weights.astype(dtype), smem["dout"].at[0])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(barriers["dout_free"].at[0])

                sums = *dvalues, sums_of_logits(spec, shift)
                *dvalues, _ = pl.run_state(accumulate)(tuple(map(plgpu.ACC.init, sums)))
                plgpu.barrier_wait(barriers["dlogits"])
                sum_dquery(0)
                return tuple(dvalues)

            plgpu.barrier_wait(barriers["key"])
            leave("dvalue", fold(path, step, zeros_of(value_dim)), 1.0)

        @pl.when(me == 1)
        def through_keys():
            plgpu.barrier_arrive(barriers["factors_free"])

            def step(head, block, number, dkeys):
                del head, block
                slot = slot_of(number, SLOTS)
                plgpu.barrier_wait(barriers["dout"].at[0])
                delta = across(load(smem["delta"].at[0], ROW))

                def accumulate(refs):
                    *dkeys, dweights = refs
                    plgpu.wgmma(dweights, smem["value"], smem["dout"].at[0].T)
                    products = plgpu.wgmma_accumulator_load(dweights)
                    plgpu.barrier_arrive(barriers["dout_free"].at[0])
                    plgpu.barrier_wait(barriers["factors"])
                    factors = register_tiles.load(smem["factors"], QUERIES)
                    dlogits = (factors * products).astype(dtype)
                    plgpu.barrier_arrive(barriers["factors_free"])
                    plgpu.barrier_wait(barriers["dlogits_free"])
                    smem["dlogits"][...] = dlogits
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(barriers["dlogits"])
                    plgpu.barrier_wait(barriers["query"].at[slot])
                    multiply_add(dkeys, dlogits, smem["query"].at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(barriers["query_free"].at[slot])

                sums = *dkeys, delta
                *dkeys, _ = pl.run_state(accumulate)(tuple(map(plgpu.ACC.init, sums)))
                sum_dquery(1)
                return tuple(dkeys)

            plgpu.barrier_wait(barriers["key"])
            leave("dkey", fold(path, step, zeros_of(dim)), spec.scale)

    smem = {
        "key": swizzled((ROWS, dim), dtype, columns=COLUMNS),
        "value": swizzled((ROWS, value_dim), dtype),
        "query": swizzled((SLOTS, QUERIES, dim), dtype, columns=COLUMNS),
        "dout": swizzled((1, QUERIES, value_dim), dtype),
        "shift": plgpu.SMEM((SLOTS, QUERIES), jnp.float32),
        "delta": plgpu.SMEM((1, QUERIES), jnp.float32),
        "factors": plgpu.SMEM(register_tiles.tile_shape(QUERIES), jnp.float32),
        "dlogits": swizzled((ROWS, QUERIES), dtype, columns=COLUMNS),
        "dquery": plgpu.SMEM((2, 1, *walk.dquery_tile[1:]), jnp.float32),
        "out": swizzled((2, ROWS, 32 // jnp.dtype(dkey_dtype).itemsize), dkey_dtype),
    }
    fetched = {"query": ["query", "shift"], "dout": ["dout", "delta"]}
    if packed:
        smem["start"] = plgpu.SMEM((SLOTS, QUERIES), jnp.int32)
        fetched["query"].append("start")
    barriers = {
        "key": plgpu.Barrier(num_arrivals=2),
        "query": plgpu.Barrier(num_arrivals=len(fetched["query"]), num_barriers=SLOTS),
        "query_free": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        "dout": plgpu.Barrier(num_arrivals=len(fetched["dout"]), num_barriers=1),
        "dout_free": plgpu.Barrier(num_arrivals=2, num_barriers=1),
        "factors": plgpu.Barrier(),
        "factors_free": plgpu.Barrier(),
        "dlogits": plgpu.Barrier(),
        "dlogits_free": plgpu.Barrier(num_arrivals=2),
        "dquery": plgpu.Barrier(num_barriers=2),
        "dquery_free": plgpu.Barrier(num_barriers=2),
    }
    sums, dkey, dvalue = walk.launch(
        compute,
        partial(walk.fetch, slots={"query": SLOTS, "dout": 1}, names=fetched),
        lambda refs, smem, barriers: add_parts(
            walk,
            refs,
            smem["dquery"],
            barriers,
            units=lambda _: [(n % 2, pl.ds(n, 1)) for n in range(parts)],
        ),
        smem,
        barriers,
        dkey_dtype,
    )
    return dq_postprocess.Total(sums, walk.seen), dkey, dvalue


def takes(dim: int, value_dim: int) -> bool:
    """Whether the kernel is for heads of this size."""
    return dim > WIDTH and dim % COLUMNS == 0 and value_dim % COLUMNS == 0


def zeros_of(dim: int) -> tuple[Array, ...]:
    """Parts of a gradient of so many columns."""
    return tuple(zeros(min(WIDTH, dim - first)) for first in range(0, dim, WIDTH))


def multiply_add(parts: list[Any], left: Array, right: Any) -> None:
    """Adds a product to an accumulator in parts."""
    for n, part in enumerate(parts):
        plgpu.wgmma(part, left, right.at[:, pl.ds(n * WIDTH, part.shape[1])])
