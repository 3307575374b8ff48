"""Backward kernel in Mosaic GPU, for Hopper: all gradients in one walk over tiles of queries.

A program has one tile of keys. Two warpgroups compute, each on half of the tile's keys: they keep
the gradients of keys and values in registers while they walk over the tiles of queries that see
the keys, of all heads of the group. They exchange the gradients of logits, so that each computes
half of the columns of the gradients of queries. One more warpgroup fetches queries and their
gradients through TMA; another one adds the gradients of queries to what other tiles of keys have
added, in float32 in global memory.

These additions come in a fixed order, as a rule from the last keys to the first, so that results
repeat their bits. Each tile of keys begins with its own queries and goes on to later ones, so that
tiles of keys at work side by side are at different queries, reach a tile of queries one after the
other, in that order, and hardly wait; head by head, so that what they read and add stays in the L2
cache. Programs take tiles of keys from the last to the first too: they start in the order of their
numbers, so that what one waits for is under way.

Without a window and documents the first keys have the most queries. So they come first, several
heads side by side, which leaves no multiprocessor idle at the end; and all walk down from the last
queries, at each of them through all heads of the group, so that programs that have started together
are at the same queries. On request the order of additions is free, but for one that stores before
others add.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_dquery
from pallas_kernels._band import key_tiles_of_queries, query_plan, sees
from pallas_kernels._mosaic_blocks import (
    MATRIX,
    ROW,
    ROWS,
    fori,
    fresh,
    load,
    swizzled,
    tell_and_wait,
)
from pallas_kernels._mosaic_gradients import (
    across,
    of_queries,
    part_width,
    sums_of_logits,
    weigh,
    write_parts,
    zeros,
)
from pallas_kernels._spec import KeyRun, Spec, Starts, vary_as

QUERIES = 64
"""Queries of a tile."""
KEYS = 2 * ROWS
"""Keys of a tile: what two warpgroups have rows."""
SLOTS = 2
"""Tiles of queries in shared memory."""
SIDE = 16
"""Heads side by side without a window: so few that several programs share one's queries."""


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
    dkey_dtype: jnp.dtype,
    ordered: bool,
) -> tuple[_mosaic_dquery.Total, Array, Array]:
    """Gradients through the first ``rows`` queries and the keys of a run that windows reach.

    Unless ``ordered``, the gradients of queries are added up in any order.

    Returns:
        dquery, to be finished; dkey; dvalue.
    """
    batch, length, heads, dim = query.shape
    _, keys, num_kv, value_dim = run.value.shape
    dtype, group = query.dtype, heads // num_kv
    packed = start.ndim > 0
    blocks = -(-rows // QUERIES)
    key_tiles = -(-keys // KEYS)
    half = dim // 2

    plan = query_plan(
        start, spec.window, 0, rows=rows, query_tile=QUERIES,
        offset=run.offset, length=keys, key_tile=KEYS, reach=0,
    )  # fmt: skip
    plan = plan if packed else plan[None]
    first, last = key_tiles_of_queries(plan, blocks)
    pairs = num_kv * batch
    longest_first = spec.window is None and not packed
    side = max(1, SIDE // group) if longest_first else None

    operands: dict[str, Any] = {
        "query": query,
        "dout": dout,
        **of_queries(spec, lse, delta, blocks * QUERIES),
        "key": run.key,
        "value": run.value,
        "plan": plan,
        "leader": first if longest_first else last,
    }
    if packed:
        operands["start"] = jnp.pad(start, ((0, 0), (0, -length % QUERIES)), mode="edge")

    def place():
        """(row, key/value head, tile of keys) of a program."""
        index = lax.axis_index("program")
        pair, tile = task(index, key_tiles, pairs, side)
        return lax.div(pair, jnp.int32(num_kv)), lax.rem(pair, jnp.int32(num_kv)), tile

    def walk(refs, step, carry):
        """Folds ``step(head, block, clear, slot, carry)`` over a program's tiles of queries."""
        row, kv_head, tile = place()
        begin, clear_begin, clear_end, end = (
            refs["plan"][row if packed else 0, tile, n] for n in range(4)
        )
        count = end - begin
        beside = None
        if packed and not run.offset:
            of_last_key = refs["start"][row, jnp.minimum(tile * KEYS + KEYS, keys) - 1]
            beside = jnp.where(of_last_key > tile * KEYS, KEYS // QUERIES, 0)

        def visit(_, state):
            member, n, slot, carry = state
            block = end - 1 - n if longest_first else begin + n
            clear = (block >= clear_begin) & (block < clear_end)
            carry = step(kv_head * group + member, block, clear, slot, carry)
            if longest_first:
                member, n = following_down(member, n, group)
            else:
                member, n = following(member, n, group, count, beside)
            return member, n, jnp.where(slot == SLOTS - 1, 0, slot + 1), carry

        zero = jnp.int32(0)
        return fori(0, count * group, visit, (zero, zero, zero, carry))[3]

    def compute(refs, smem, barriers, me):
        row, kv_head, tile = place()
        first_key = tile * KEYS + me * ROWS + run.offset
        mine = pl.ds(me * ROWS, ROWS)

        def mask(slot, block, weights):
            j = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 0, layout=MATRIX)
            i = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 1, layout=MATRIX)
            i, j = i * fresh(1) + block * QUERIES, j + first_key
            starts = across(load(smem["start"].at[slot], ROW)) if packed else None
            seen = sees(i, j, starts, spec.window, 0, packed=packed)
            if keys % KEYS:
                seen &= j < run.offset + keys
            return jnp.where(seen, weights, 0.0)

        def step(head, block, clear, slot, carry):
            del head
            dkey, dvalue = carry
            plgpu.barrier_wait(barriers["query"].at[slot])
            query_smem, dout_smem = smem["query"].at[slot], smem["dout"].at[slot]
            here = pl.ds(fresh(me) * ROWS, ROWS)
            shift = across(load(smem["shift"].at[slot], ROW))
            delta = across(load(smem["delta"].at[slot], ROW))

            def accumulate(refs):
                dkey, dvalue, logits, dweights = refs
                plgpu.wgmma(logits, smem["key"].at[here], query_smem.T)
                plgpu.wgmma(dweights, smem["value"].at[here], dout_smem.T)
                masked = partial(mask, slot, block)
                weights, dlogits = weigh(spec, logits, dweights, shift, clear, masked, dtype)
                plgpu.wgmma(dvalue, weights, dout_smem)
                plgpu.barrier_wait(barriers["dlogits_free"])
                smem["dlogits"].at[mine][...] = dlogits
                plgpu.commit_smem()
                plgpu.barrier_arrive(barriers["dlogits"])
                plgpu.barrier_wait(barriers["dlogits"])

                def multiply(dquery):
                    columns = pl.ds(fresh(me) * half, half)
                    plgpu.wgmma(dquery, smem["dlogits"].T, smem["key"].at[:, columns])
                    plgpu.wgmma(dkey, dlogits, query_smem)
                    result = plgpu.wgmma_accumulator_load(dquery, wait_n=1)
                    plgpu.barrier_arrive(barriers["dlogits_free"])
                    plgpu.barrier_wait(barriers["dquery_free"].at[slot])
                    _mosaic_dquery.store(smem["dquery"].at[slot, me], result)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(barriers["dquery"].at[slot])

                pl.run_scoped(multiply, plgpu.ACC((QUERIES, half), jnp.float32))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(barriers["query_free"].at[slot])

            sums = dkey, dvalue, sums_of_logits(spec, shift), delta
            return pl.run_state(accumulate)(tuple(map(plgpu.ACC.init, sums)))[:2]

        plgpu.barrier_wait(barriers["key"])
        dkey, dvalue = walk(refs, step, (zeros(dim), zeros(value_dim)))
        where = (row, pl.ds(tile * KEYS + me * ROWS, ROWS), kv_head)
        for name, result in (("dvalue", dvalue), ("dkey", dkey * spec.scale)):

            def there(column, width, ref=refs[name]):
                return ref.at[(*where, pl.ds(column, width))]

            write_parts(result, smem["out"].at[me], there)
        plgpu.wait_smem_to_gmem(0)

    def fetch(refs, smem, barriers):
        row, kv_head, tile = place()
        for name in ("key", "value"):
            source = refs[name].at[row, pl.ds(tile * KEYS, KEYS), kv_head]
            plgpu.copy_gmem_to_smem(source, smem[name], barriers["key"])

        def step(head, block, clear, slot, _):
            del clear
            ready = barriers["query"].at[slot]
            plgpu.barrier_wait(barriers["query_free"].at[slot])
            where = pl.ds(block * QUERIES, QUERIES)
            for name in ("query", "dout"):
                source = refs[name].at[row, where, head]
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot], ready)
            for name in ("shift", "delta"):
                source = refs[name].at[row, head, where]
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot], ready)
            if packed:
                source = refs["start"].at[row, where]
                plgpu.copy_gmem_to_smem(source, smem["start"].at[slot], ready)

        walk(refs, step, None)

    def add(refs, smem, barriers):
        """Adds the gradients of queries to what other programs have added, or stores the first.

        A counter of each tile of queries says how many have added; where they add in any order,
        whether the first has stored.
        """
        row, _, tile = place()

        def step(head, block, clear, slot, previous):
            del clear
            # The tiles of keys that see a tile of queries are consecutive.
            before = jnp.abs(refs["leader"][row if packed else 0, block] - tile)
            before = before if ordered else jnp.minimum(before, 1)
            *there, tells = previous
            counter = refs["counter"]
            tell_and_wait(counter.at[row, *there], tells, counter.at[row, head, block], before)
            plgpu.barrier_wait(barriers["dquery"].at[slot])

            def send(reduction):
                plgpu.copy_smem_to_gmem(
                    smem["dquery"].at[slot],
                    refs["dquery"].at[row, head, block],
                    commit_group=False,
                    reduction_op=reduction,
                )

            pl.when(before == 0)(partial(send, None))
            pl.when(before > 0)(partial(send, "add"))
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(barriers["dquery_free"].at[slot])
            return head, block, jnp.int32(1 if ordered else before == 0)

        *there, tells = walk(refs, step, (jnp.int32(0),) * 3)
        counter = refs["counter"].at[row, *there]
        tell_and_wait(counter, tells, counter, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    dquery_tile = (2, *_mosaic_dquery.tile_shape(half))
    smem = {
        "key": swizzled((KEYS, dim), dtype, columns=half),
        "value": swizzled((KEYS, value_dim), dtype),
        "query": swizzled((SLOTS, QUERIES, dim), dtype, columns=half),
        "dout": swizzled((SLOTS, QUERIES, value_dim), dtype),
        "shift": plgpu.SMEM((SLOTS, QUERIES), jnp.float32),
        "delta": plgpu.SMEM((SLOTS, QUERIES), jnp.float32),
        "dlogits": swizzled((KEYS, QUERIES), dtype, columns=half),
        "dquery": plgpu.SMEM((SLOTS, *dquery_tile), jnp.float32),
        "out": swizzled((2, ROWS, part_width(dkey_dtype, dim, value_dim)), dkey_dtype),
    }
    barriers = {
        "key": plgpu.Barrier(num_arrivals=2),
        "query": plgpu.Barrier(num_arrivals=5 if packed else 4, num_barriers=SLOTS),
        "query_free": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        "dlogits": plgpu.Barrier(num_arrivals=2),
        "dlogits_free": plgpu.Barrier(num_arrivals=2),
        "dquery": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        "dquery_free": plgpu.Barrier(num_barriers=SLOTS),
    }
    if packed:
        smem["start"] = plgpu.SMEM((SLOTS, QUERIES), jnp.int32)
    outputs = {
        "dquery": jax.ShapeDtypeStruct((batch, heads, blocks, *dquery_tile), jnp.float32),
        "dkey": jax.ShapeDtypeStruct(run.key.shape, dkey_dtype),
        "dvalue": jax.ShapeDtypeStruct(run.value.shape, dkey_dtype),
    }
    operands["counter"] = jax.new_ref(jnp.zeros((batch, heads, blocks), jnp.int32))

    def ring_swa_backward_fused(*refs):
        inputs = dict(zip((*operands, *outputs), refs, strict=True))

        def body(smem, barriers):
            me = lax.axis_index("warpgroup")

            @pl.when(me < 2)
            def computing():
                plgpu.set_max_registers(232, action="increase")

                # At first all shared memory is free.
                plgpu.barrier_arrive(barriers["dlogits_free"])
                for slot in range(SLOTS):
                    plgpu.barrier_arrive(barriers["query_free"].at[slot])
                compute(inputs, smem, barriers, me)

            @pl.when(me == 2)
            def fetching():
                plgpu.set_max_registers(24, action="decrease")
                fetch(inputs, smem, barriers)

            @pl.when(me == 3)
            def adding():
                plgpu.set_max_registers(24, action="decrease")
                for slot in range(SLOTS):
                    plgpu.barrier_arrive(barriers["dquery_free"].at[slot])
                add(inputs, smem, barriers)

        pl.run_scoped(body, smem, barriers, collective_axes="warpgroup")

    results = plgpu.kernel(
        ring_swa_backward_fused,
        out_type=tuple(outputs.values()),
        grid=(key_tiles * pairs,),
        grid_names=("program",),
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*operands.values())
    # Kernels of Mosaic GPU know nothing of manual mesh axes.
    parts, dkey, dvalue = (vary_as(query, x) for x in results)
    return _mosaic_dquery.Total(parts, first <= last), dkey, dvalue


def task(index, key_tiles: int, pairs: int, side: int | None):
    """(which of the pairs of a row and a head, which of its tiles of keys) a program has.

    The last tiles of a pair first; or the first ones of so many pairs ``side`` by side.
    """
    if side is None:
        last = key_tiles - 1
        return lax.div(index, jnp.int32(key_tiles)), last - lax.rem(index, jnp.int32(key_tiles))
    before = lax.div(index, jnp.int32(key_tiles * side)) * side
    index = index - before * key_tiles
    width = jnp.minimum(pairs - before, side)
    return before + lax.rem(index, width), lax.div(index, width)


def following(member, n, group: int, count, beside=None):
    """The next step of a walk over ``count`` tiles of queries of a group's heads, head by head.

    But if so many tiles ``beside`` the tile of keys are given, they come first, for all heads. That
    is for keys of several documents: tiles of keys of the first one would else wait for this walk
    at the end of each of their heads.
    """
    last = n == count - 1
    if beside is None:
        return jnp.where(last, member + 1, member), jnp.where(last, 0, n + 1)
    near = n < beside
    last = jnp.where(near, member == group - 1, last)
    next_head = near != last
    next_member = jnp.where(next_head, member + 1, jnp.where(near, 0, member))
    return next_member, jnp.where(next_head, jnp.where(near, n, beside), n + 1)


def following_down(member, n, group: int):
    """The next step of a walk over tiles of queries, at each of them through a group's heads."""
    last = member == group - 1
    return jnp.where(last, 0, member + 1), jnp.where(last, n + 1, n)
