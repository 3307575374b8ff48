"""Backward kernel in Mosaic GPU, for Hopper: all gradients in one walk over tiles of keys.

A program takes tiles of keys one after the other. Two warpgroups compute, each on half of a
tile's keys: they keep the gradients of keys and values in registers while they walk over the
tiles of queries that see the keys, of all heads of the group. One more warpgroup fetches queries
and their gradients through TMA; another one adds the gradients of queries to what other tiles of
keys have added, in float32 in global memory.

These additions come in a fixed order, from the last keys to the first, so that results repeat their
bits. Each tile of keys begins with its own queries and goes on to later ones, so that tiles of keys
at work side by side are at different queries, reach a tile of queries one after the other, in that
order, and hardly wait. Programs take tiles of keys from the last to the first too: what a program
waits for is under way.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._band import query_plan, sees
from pallas_kernels._logits import LOG2_E, cap_logits
from pallas_kernels._mosaic_blocks import MATRIX, ROW, ROWS, fori, load, swizzled, wait_for, add_one
from pallas_kernels._spec import KeyRun, Spec, Starts, vary_as

QUERIES = 64
"""Queries of a tile."""
KEYS = 2 * ROWS
"""Keys of a tile: what two warpgroups have rows."""
DEAD = 1e30
"""Stands for the log-sum-exp of a query that has seen no key, so that it weights none."""


def backward(
    spec: Spec,
    query: Array,
    run: KeyRun,
    start: Starts,
    dout: Array,
    lse: Array,
    delta: Array,
    *,
    rows: int,
    out_dtype: jnp.dtype,
    slots: int,
    programs: int,
) -> tuple[Array, Array, Array]:
    """Gradients through the first ``rows`` queries and the keys of a run.

    Returns:
        dquery / scale in float32, of rows rounded up to a tile; dkey; dvalue.
    """
    batch, length, heads, dim = query.shape
    _, keys, num_kv, value_dim = run.value.shape
    dtype, group = query.dtype, heads // num_kv
    packed = start.ndim > 0
    blocks = -(-rows // QUERIES)
    key_tiles = -(-keys // KEYS)
    items = key_tiles * num_kv * batch
    grid = min(programs, items)
    half = dim // 2

    plan = query_plan(
        start, spec.window, 0, rows=rows, query_tile=QUERIES,
        offset=run.offset, length=keys, key_tile=KEYS, reach=0,
    )  # fmt: skip
    plan = plan if packed else plan[None]
    # The tiles of keys that a tile of queries sees are consecutive; this is the last of them.
    tiles_of_queries = jnp.arange(blocks, dtype=jnp.int32)
    last = jax.vmap(lambda begin: jnp.searchsorted(begin, tiles_of_queries, side="right"))(
        plan[..., 0]
    )

    def filled(x, value):
        """[B, N, at least rows] cut or filled up to whole tiles."""
        x = x[..., : blocks * QUERIES]
        pad = ((0, 0), (0, 0), (0, blocks * QUERIES - x.shape[-1]))
        return jnp.pad(x, pad, constant_values=value)

    operands: dict[str, Any] = {
        "query": query,
        "dout": dout,
        "top": filled(jnp.where(lse > -jnp.inf, lse * LOG2_E, DEAD), DEAD),
        "delta": filled(delta, 0.0),
        "key": run.key,
        "value": run.value,
        "plan": plan,
        "last": last.astype(jnp.int32) - 1,
    }
    if packed:
        operands["start"] = jnp.pad(start, ((0, 0), (0, -length % QUERIES)), mode="edge")

    def locate(number):
        """(row, key/value head, tile of keys) of a program's ``number``-th item."""
        index = lax.axis_index("program") + number * grid
        tile = key_tiles - 1 - lax.rem(index, jnp.int32(key_tiles))
        index = lax.div(index, jnp.int32(key_tiles))
        return lax.div(index, jnp.int32(num_kv)), lax.rem(index, jnp.int32(num_kv)), tile

    def num_items():
        return lax.div(items - lax.axis_index("program") + grid - 1, jnp.int32(grid))

    def ranges(refs, row, tile):
        return [refs["plan"][row if packed else 0, tile, n] for n in range(4)]

    def walk(refs, number, step, carry):
        """Folds ``step(n, head, block, carry)`` over the steps of an item."""
        row, kv_head, tile = locate(number)
        begin, clear_begin, clear_end, end = ranges(refs, row, tile)
        count = end - begin

        def visit(n, carry):
            member = lax.div(n, count)
            block = begin + n - member * count
            clear = (block >= clear_begin) & (block < clear_end)
            return step(n, kv_head * group + member, block, clear, carry)

        return fori(0, count * group, visit, carry), count * group

    def compute(refs, smem, barriers, me):
        def item(number, passed):
            row, kv_head, tile = locate(number)
            first_key = tile * KEYS + me * ROWS + run.offset
            mine = pl.ds(me * ROWS, ROWS)
            key_mine, value_mine = smem["key"].at[mine], smem["value"].at[mine]
            plgpu.barrier_wait(barriers["key"])

            def masked(starts_slot, block, weights):
                j = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 0, layout=MATRIX)
                i = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 1, layout=MATRIX)
                i, j = i + block * QUERIES, j + first_key
                starts = None
                if packed:
                    starts = across(load(smem["start"].at[starts_slot], ROW))
                seen = sees(i, j, starts, spec.window, 0, packed=packed)
                if keys % KEYS:
                    seen &= j < run.offset + keys
                return jnp.where(seen, weights, 0.0)

            def step(n, head, block, clear, carry):
                slot = lax.rem(passed + n, jnp.int32(slots))
                query_smem, dout_smem = smem["query"].at[slot], smem["dout"].at[slot]

                def accumulate(refs):
                    dkey, dvalue = refs

                    def products(logits, dweights):
                        plgpu.barrier_wait(barriers["query"].at[slot])
                        plgpu.wgmma(logits, key_mine, query_smem.T)
                        plgpu.wgmma(dweights, value_mine, dout_smem.T)
                        products = plgpu.wgmma_accumulator_load(logits, wait_n=1)
                        top = across(load(smem["top"].at[slot], ROW))
                        delta = across(load(smem["delta"].at[slot], ROW))
                        scaled, factor, dcap = cap_logits(spec, products)
                        weights = jnp.exp2(scaled * factor - top)
                        weights = lax.cond(
                            clear, lambda x: x, partial(masked, slot, block), weights
                        )
                        dlogits = weights * (dweights[...] - delta)
                        if dcap is not None:
                            dlogits = dlogits * dcap
                        return weights.astype(dtype), dlogits.astype(dtype)

                    shape = plgpu.ACC((ROWS, QUERIES), jnp.float32)
                    weights, dlogits = pl.run_scoped(products, shape, shape)
                    plgpu.wgmma(dvalue, weights, dout_smem)
                    plgpu.wgmma(dkey, dlogits, query_smem)
                    plgpu.barrier_wait(barriers["dlogits_free"])
                    smem["dlogits"].at[mine][...] = dlogits
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(barriers["dlogits"])
                    plgpu.barrier_wait(barriers["dlogits"])

                    def multiply(dquery):
                        columns = pl.ds(me * half, half)
                        plgpu.wgmma(dquery, smem["dlogits"].T, smem["key"].at[:, columns])
                        return dquery[...]

                    dquery = pl.run_scoped(multiply, plgpu.ACC((QUERIES, half), jnp.float32))
                    plgpu.barrier_arrive(barriers["dlogits_free"])
                    plgpu.barrier_arrive(barriers["query_free"].at[slot])
                    plgpu.barrier_wait(barriers["dquery_free"])
                    smem["dquery"].at[me][...] = dquery
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(barriers["dquery"])

                return pl.run_state(accumulate)(tuple(map(plgpu.ACC.init, carry)))

            zeros = [
                plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), MATRIX)
                for width in (dim, value_dim)
            ]
            (dkey, dvalue), steps = walk(refs, number, step, tuple(zeros))
            plgpu.barrier_arrive(barriers["key_free"])
            for name, result, ref in (
                ("dkey", dkey * spec.scale, refs["dkey"]),
                ("dvalue", dvalue, refs["dvalue"]),
            ):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                width = result.shape[1]
                out = smem["out"].at[me]
                for column in range(0, width, out_width):
                    if column:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    part = result[:, column : column + out_width] if width != out_width else result
                    out[...] = part.astype(out_dtype)
                    plgpu.commit_smem()
                    where = (row, pl.ds(tile * KEYS + me * ROWS, ROWS), kv_head)
                    plgpu.copy_smem_to_gmem(out, ref.at[(*where, pl.ds(column, out_width))])
            return passed + steps

        fori(0, num_items(), item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def fetch(refs, smem, barriers):
        def item(number, passed):
            row, kv_head, tile = locate(number)

            @pl.when(number > 0)
            def wait():
                plgpu.barrier_wait(barriers["key_free"])

            for name in ("key", "value"):
                source = refs[name].at[row, pl.ds(tile * KEYS, KEYS), kv_head]
                plgpu.copy_gmem_to_smem(source, smem[name], barriers["key"])

            def step(n, head, block, clear, _):
                del clear
                slot = lax.rem(passed + n, jnp.int32(slots))
                ready = barriers["query"].at[slot]

                @pl.when(passed + n >= slots)
                def wait():
                    plgpu.barrier_wait(barriers["query_free"].at[slot])

                where = pl.ds(block * QUERIES, QUERIES)
                for name in ("query", "dout"):
                    source = refs[name].at[row, where, head]
                    plgpu.copy_gmem_to_smem(source, smem[name].at[slot], ready)
                for name in ("top", "delta"):
                    source = refs[name].at[row, head, where]
                    plgpu.copy_gmem_to_smem(source, smem[name].at[slot], ready)
                if packed:
                    source = refs["start"].at[row, where]
                    plgpu.copy_gmem_to_smem(source, smem["start"].at[slot], ready)

            _, steps = walk(refs, number, step, None)
            return passed + steps

        fori(0, num_items(), item, jnp.int32(0))

    def add(refs, smem, barriers):
        """Adds the gradients of queries, each tile of queries in the fixed order."""

        def item(number, _):
            row, _, tile = locate(number)

            def step(n, head, block, clear, _):
                del n, clear
                plgpu.barrier_wait(barriers["dquery"])
                turn = refs["turn"].at[row, head, block]
                wait_for(turn, refs["last"][row if packed else 0, block] - tile)
                for part in range(2):
                    where = (row, pl.ds(block * QUERIES, QUERIES), head, pl.ds(part * half, half))
                    plgpu.copy_smem_to_gmem(
                        smem["dquery"].at[part],
                        refs["dquery"].at[where],
                        commit_group=False,
                        reduction_op="add",
                    )
                plgpu.commit_smem_to_gmem_group()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(barriers["dquery_free"])
                plgpu.wait_smem_to_gmem(0)
                add_one(turn)

            walk(refs, number, step, None)

        fori(0, num_items(), item, None)

    out_width = 64 if dim % 64 == 0 and value_dim % 64 == 0 else 16
    smem = {
        "key": swizzled((KEYS, dim), dtype, columns=half),
        "value": swizzled((KEYS, value_dim), dtype),
        "query": swizzled((slots, QUERIES, dim), dtype, columns=half),
        "dout": swizzled((slots, QUERIES, value_dim), dtype),
        "top": plgpu.SMEM((slots, QUERIES), jnp.float32),
        "delta": plgpu.SMEM((slots, QUERIES), jnp.float32),
        "dlogits": swizzled((KEYS, QUERIES), dtype, columns=half),
        "dquery": swizzled((2, QUERIES, half), jnp.float32),
        "out": swizzled((2, ROWS, out_width), out_dtype),
    }
    barriers = {
        "key": plgpu.Barrier(num_arrivals=2),
        "key_free": plgpu.Barrier(num_arrivals=2),
        "query": plgpu.Barrier(num_arrivals=5 if packed else 4, num_barriers=slots),
        "query_free": plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        "dlogits": plgpu.Barrier(num_arrivals=2),
        "dlogits_free": plgpu.Barrier(num_arrivals=2),
        "dquery": plgpu.Barrier(num_arrivals=2),
        "dquery_free": plgpu.Barrier(),
    }
    if packed:
        smem["start"] = plgpu.SMEM((slots, QUERIES), jnp.int32)
    leaves, tree = jax.tree.flatten(operands)

    def ring_swa_backward(*refs):
        *inputs, dquery_ref, turn_ref, dkey_ref, dvalue_ref = refs
        inputs = jax.tree.unflatten(tree, inputs)
        inputs |= {"dquery": dquery_ref, "turn": turn_ref, "dkey": dkey_ref, "dvalue": dvalue_ref}

        def body(smem, barriers):
            me = lax.axis_index("warpgroup")

            @pl.when(me < 2)
            def computing():
                plgpu.set_max_registers(232, action="increase")

                # Nothing is in the shared memory that the first step waits for.
                plgpu.barrier_arrive(barriers["dlogits_free"])
                compute(inputs, smem, barriers, me)

            @pl.when(me == 2)
            def fetching():
                plgpu.set_max_registers(24, action="decrease")
                fetch(inputs, smem, barriers)

            @pl.when(me == 3)
            def adding():
                plgpu.set_max_registers(24, action="decrease")
                plgpu.barrier_arrive(barriers["dquery_free"])
                add(inputs, smem, barriers)

        pl.run_scoped(body, smem, barriers, collective_axes="warpgroup")

    # Refs and kernels of Mosaic GPU know nothing of manual mesh axes.
    dquery = jax.new_ref(jnp.zeros((batch, blocks * QUERIES, heads, dim), jnp.float32))
    turn = jax.new_ref(jnp.zeros((batch, heads, blocks), jnp.int32))
    dkey, dvalue = (jax.new_ref(lax.empty(x.shape, out_dtype)) for x in run[:2])
    plgpu.kernel(
        ring_swa_backward,
        out_type=(),
        grid=(grid,),
        grid_names=("program",),
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*leaves, dquery, turn, dkey, dvalue)
    dquery, dkey, dvalue = (vary_as(query, jax.freeze(x)) for x in (dquery, dkey, dvalue))
    return dquery, dkey, dvalue


def across(x: Array) -> Array:
    """A row as a matrix of equal rows."""
    return lax.broadcast_in_dim(x, (ROWS, QUERIES), [1])
