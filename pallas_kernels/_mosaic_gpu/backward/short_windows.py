"""Backward kernel in Mosaic GPU, for Hopper and short windows: all gradients, each stored once.

A program walks along a stretch of the sequence, for one head of keys, from one tile of queries to
the next, head by head. A window reaches back `REACH` tiles at most, so that all keys that a tile of
queries sees are at hand: three warpgroups compute, each with one tile of keys, whose gradients it
keeps in registers until the walk has passed. The fourth one fetches through TMA, multiplies the
gradients of logits of all three with the keys, and stores the gradients of queries; it also
computes delta, the sums of outputs times their gradients. Nothing is added up in global memory, so
results repeat their bits.

Neighbouring stretches share nothing: each computes again what the `REACH` tiles of keys before it
and the `REACH` tiles of queries behind it need.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._kernels import BackwardInputs
from pallas_kernels._logits import LOWEST
from pallas_kernels._masks import sees
from pallas_kernels._mosaic_gpu.backward.softmax import (
    part_width,
    shift_of,
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
    release_smem,
    swizzled,
    zeros,
)
from pallas_kernels._spec import Spec
from pallas_kernels._varying import vary_as

TILE = ROWS
"""Queries of a tile, and keys."""


PART = 32
"""Queries of a tile whose logits a warpgroup has in registers at a time."""


REACH = 2
"""Tiles of keys before a tile of queries that its windows reach."""


LONGEST_WINDOW = REACH * TILE


SLOTS = 3
"""Tiles of queries in shared memory."""


KEY_SLOTS = REACH + 2
"""Tiles of keys in shared memory: those of a tile of queries, and the next."""


OWNERS = REACH + 1
"""Warpgroups that compute."""


def backward(
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Array | None,
    *,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
    processors: int,
) -> tuple[Array, Array, Array, Array]:
    """Gradients through the shard's own keys, where windows reach `LONGEST_WINDOW` at most.

    Returns:
        dquery, with what is given added; dkey; dvalue; delta.
    """
    query, (run,), _, start, out, dout, lse = inputs
    batch, length, heads, dim = query.shape
    _, _, num_kv, value_dim = run.value.shape
    dtype, group = query.dtype, heads // num_kv
    packed = start.ndim > 0
    blocks = -(-length // TILE)
    pairs = num_kv * batch
    stretch = stretch_length(blocks, pairs, processors)
    stretches = -(-blocks // stretch)
    pad = -length % TILE
    shift = shift_of(spec, lse)
    operands: dict[str, Any] = {
        "query": query,
        "dout": dout,
        "out": out,
        "shift": jnp.pad(shift, ((0, 0), (0, 0), (0, pad)), constant_values=LOWEST),
        "key": run.key,
        "value": run.value,
    }
    if packed:
        operands["start"] = jnp.pad(start, ((0, 0), (0, pad)), mode="edge")
    near = 0
    if dquery is not None:
        near = -(-dquery.shape[1] // TILE)
        missing = near * TILE - dquery.shape[1]
        operands["more"] = jnp.pad(dquery, ((0, 0), (0, missing), (0, 0), (0, 0)))

    def place():
        """(row, key/value head, first tile, end of tiles of keys, end of tiles of queries)."""
        index = lax.axis_index("program")
        pair = lax.rem(index, jnp.int32(pairs))
        first = lax.div(index, jnp.int32(pairs)) * stretch
        end = jnp.minimum(first + stretch, blocks)
        stop = jnp.minimum(end + REACH, blocks)
        row, kv_head = lax.div(pair, jnp.int32(num_kv)), lax.rem(pair, jnp.int32(num_kv))
        return row, kv_head, first, end, stop

    def compute(refs, smem, barriers, me):
        row, kv_head, first, end, stop = place()

        def step(tile, first_block, passed, n, carry):
            number = passed + n
            slot, pair = lax.rem(number, jnp.int32(SLOTS)), lax.bitwise_and(number, jnp.int32(1))
            block = first_block + lax.div(n, jnp.int32(group))
            here = key_slot(tile)
            plgpu.barrier_wait(barriers["query"].at[slot])
            plgpu.barrier_wait(barriers["delta"].at[slot])
            clear = (tile < block) & (tile >= 0) & ((block - tile + 1) * TILE - 1 <= spec.window)
            if packed:
                clear &= smem["start"][slot, TILE - 1] <= tile * TILE

            def part(number, dkey, dvalue):
                rows = pl.ds(number * PART, PART)
                query_smem, dout_smem = smem["query"].at[slot, rows], smem["dout"].at[slot, rows]
                shift = across(load(smem["shift"].at[slot, rows], ROW))
                delta = across(load(smem["delta"].at[slot, rows], ROW))

                def mask(weights):
                    j = plgpu.broadcasted_iota(jnp.int32, (TILE, PART), 0, layout=MATRIX)
                    i = plgpu.broadcasted_iota(jnp.int32, (TILE, PART), 1, layout=MATRIX)
                    i, j = i * fresh(1) + (block * TILE + number * PART), j + tile * TILE
                    starts = across(load(smem["start"].at[slot, rows], ROW)) if packed else None
                    seen = sees(i, j, starts, spec.window, 0, packed=packed) & (j >= 0)
                    return jnp.where(seen, weights, 0.0)

                def accumulate(refs):
                    dkey, dvalue, logits, dweights = refs
                    plgpu.wgmma(logits, smem["key"].at[here], query_smem.T)
                    plgpu.wgmma(dweights, smem["value"].at[here], dout_smem.T)
                    weights, dlogits = weigh(spec, logits, dweights, shift, clear, mask, dtype)
                    plgpu.wgmma(dvalue, weights, dout_smem)
                    plgpu.wgmma(dkey, dlogits, query_smem)
                    if number == 0:
                        plgpu.barrier_wait(barriers["dlogits_free"].at[pair])
                    smem["dlogits"].at[pair, me, :, rows][...] = dlogits
                    if number == TILE // PART - 1:
                        release_smem()
                        plgpu.barrier_arrive(barriers["dlogits"].at[pair])
                    plgpu.wgmma_wait(0)

                sums = dkey, dvalue, sums_of_logits(spec, shift), delta
                return pl.run_state(accumulate)(tuple(map(plgpu.ACC.init, sums)))[:2]

            for number in range(TILE // PART):
                carry = part(number, *carry)
            plgpu.barrier_arrive(barriers["query_free"].at[slot])
            return carry

        def own(number, _):
            tile = key_tile(first, me) + number * OWNERS
            plgpu.barrier_wait(barriers["key"].at[me])
            first_block = jnp.maximum(tile, first)
            count = jnp.minimum(tile + OWNERS, stop) - first_block
            visit = partial(step, tile, first_block, (first_block - first) * group)
            results = fori(0, count * group, visit, (zeros(dim), zeros(value_dim)))

            @pl.when((tile >= first) & (tile < end))
            def write():
                dkey, dvalue = results
                where = (row, pl.ds(tile * TILE, TILE), kv_head)
                for name, result in (("dvalue", dvalue), ("dkey", dkey * spec.scale)):

                    def there(column, width, ref=refs[name]):
                        return ref.at[(*where, pl.ds(column, width))]

                    write_parts(result, smem["dkeys"].at[me], there)

        count = lax.div(stop - 1 - key_tile(first, me), jnp.int32(OWNERS)) + 1
        fori(0, count, own, None)
        plgpu.wait_smem_to_gmem(0)

    def serve(refs, smem, barriers):
        """Fetches, and computes the gradients of queries and ``-delta``."""
        row, kv_head, first, end, stop = place()
        count = (stop - first) * group

        def at(number):
            """(slot, tile of queries, head) of a step."""
            block = first + lax.div(number, jnp.int32(group))
            head = kv_head * group + lax.rem(number, jnp.int32(group))
            return lax.rem(number, jnp.int32(SLOTS)), block, head

        def fetch_keys(tile):
            ready = barriers["key"].at[lax.rem(tile + OWNERS, jnp.int32(OWNERS))]
            where = pl.ds(jnp.maximum(tile, 0) * TILE, TILE)
            for name in ("key", "value"):
                source = refs[name].at[row, where, kv_head]
                plgpu.copy_gmem_to_smem(source, smem[name].at[key_slot(tile)], ready)

        def fetch_queries(number):
            slot, block, head = at(number)
            ready, where = barriers["query"].at[slot], pl.ds(block * TILE, TILE)
            for name in ("query", "dout", "out"):
                source = refs[name].at[row, where, head]
                plgpu.copy_gmem_to_smem(source, smem[name].at[slot], ready)
            source = refs["shift"].at[row, head, where]
            plgpu.copy_gmem_to_smem(source, smem["shift"].at[slot], ready)
            if packed:
                source = refs["start"].at[row, where]
                plgpu.copy_gmem_to_smem(source, smem["start"].at[slot], ready)

        def find_delta(number):
            slot, block, head = at(number)
            plgpu.barrier_wait(barriers["query"].at[slot])
            out = load(smem["out"].at[slot], MATRIX).astype(jnp.float32)
            dout = load(smem["dout"].at[slot], MATRIX).astype(jnp.float32)
            delta = smem["delta"].at[slot]
            delta[...] = -(out * dout).sum(axis=1)
            plgpu.commit_smem()
            plgpu.barrier_arrive(barriers["delta"].at[slot])

            @pl.when(block < end)
            def store():
                there = refs["delta"].at[row, head, pl.ds(block * TILE, TILE)]
                plgpu.copy_smem_to_gmem(delta, there)

        def step(number, _):
            _, block, head = at(number)
            pair = lax.bitwise_and(number, jnp.int32(1))
            begins = head == kv_head * group

            @pl.when(number + 1 < count)
            def look_ahead():
                find_delta(number + 1)

            @pl.when(begins & (block > first))
            def wait_for_keys():
                plgpu.barrier_wait(barriers["key"].at[lax.rem(block, jnp.int32(OWNERS))])

            plgpu.barrier_wait(barriers["dlogits"].at[pair])

            # All have left the tile of keys before those that this step needs.
            @pl.when(begins & (block + 1 < stop))
            def fetch_next_keys():
                fetch_keys(block + 1)

            ahead = number + SLOTS - 1

            @pl.when(ahead < count)
            def fetch_next_queries():
                @pl.when(number > 0)
                def wait():
                    plgpu.barrier_wait(barriers["query_free"].at[lax.rem(ahead, jnp.int32(SLOTS))])

                fetch_queries(ahead)

            def multiply(dquery):
                for owner in range(OWNERS):
                    keys = smem["key"].at[key_slot(key_tile(block, owner))]
                    plgpu.wgmma(dquery, smem["dlogits"].at[pair, owner].T, keys)
                return dquery[...]

            result = pl.run_scoped(multiply, plgpu.ACC((TILE, dim), jnp.float32))
            plgpu.barrier_arrive(barriers["dlogits_free"].at[pair])

            @pl.when(block < end)
            def write():
                total = result * spec.scale
                where = (row, pl.ds(block * TILE, TILE), head)
                if near:
                    here = (row, pl.ds(jnp.minimum(block, near - 1) * TILE, TILE), head)
                    total = lax.cond(
                        block < near,
                        lambda x: x + load(refs["more"].at[here], MATRIX),
                        lambda x: x,
                        total,
                    )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                smem["dquery"][...] = total.astype(dquery_dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem["dquery"], refs["dquery"].at[where])

        for tile in range(-REACH, 1):
            fetch_keys(first + tile)
        fetch_queries(jnp.int32(0))

        @pl.when(count > 1)
        def fetch_second():
            fetch_queries(jnp.int32(1))

        for owner in range(OWNERS):
            plgpu.barrier_wait(barriers["key"].at[owner])
        find_delta(jnp.int32(0))
        fori(0, count, step, None)
        plgpu.wait_smem_to_gmem(0)

    smem = {
        "key": swizzled((KEY_SLOTS, TILE, dim), dtype, columns=PART),
        "value": swizzled((KEY_SLOTS, TILE, value_dim), dtype, columns=PART),
        "query": swizzled((SLOTS, TILE, dim), dtype, columns=PART),
        "dout": swizzled((SLOTS, TILE, value_dim), dtype, columns=PART),
        "out": swizzled((SLOTS, TILE, value_dim), dtype),
        "shift": plgpu.SMEM((SLOTS, TILE), jnp.float32),
        "delta": plgpu.SMEM((SLOTS, TILE), jnp.float32),
        "dlogits": swizzled((2, OWNERS, TILE, TILE), dtype, columns=PART),
        "dquery": swizzled((TILE, dim), dquery_dtype),
        "dkeys": swizzled((OWNERS, TILE, part_width(dkey_dtype, dim, value_dim)), dkey_dtype),
    }
    barriers = {
        "key": plgpu.Barrier(num_arrivals=2, num_barriers=OWNERS),
        "query": plgpu.Barrier(num_arrivals=5 if packed else 4, num_barriers=SLOTS),
        "query_free": plgpu.Barrier(num_arrivals=OWNERS, num_barriers=SLOTS),
        "delta": plgpu.Barrier(num_barriers=SLOTS),
        "dlogits": plgpu.Barrier(num_arrivals=OWNERS, num_barriers=2),
        "dlogits_free": plgpu.Barrier(num_barriers=2),
    }
    if packed:
        smem["start"] = plgpu.SMEM((SLOTS, TILE), jnp.int32)
    outputs = {
        "dquery": jax.ShapeDtypeStruct(query.shape, dquery_dtype),
        "dkey": jax.ShapeDtypeStruct(run.key.shape, dkey_dtype),
        "dvalue": jax.ShapeDtypeStruct(run.value.shape, dkey_dtype),
        "delta": jax.ShapeDtypeStruct((batch, heads, blocks * TILE), jnp.float32),
    }

    def ring_swa_backward_short(*refs):
        inputs = dict(zip((*operands, *outputs), refs, strict=True))

        def body(smem, barriers):
            me = lax.axis_index("warpgroup")

            @pl.when(me < OWNERS)
            def computing():
                plgpu.set_max_registers(144, action="increase")
                compute(inputs, smem, barriers, me)

            @pl.when(me == OWNERS)
            def serving():
                plgpu.set_max_registers(80, action="decrease")
                for pair in range(2):
                    plgpu.barrier_arrive(barriers["dlogits_free"].at[pair])
                serve(inputs, smem, barriers)

        pl.run_scoped(body, smem, barriers, collective_axes="warpgroup")

    results = plgpu.kernel(
        ring_swa_backward_short,
        out_type=tuple(outputs.values()),
        grid=(pairs * stretches,),
        grid_names=("program",),
        num_threads=OWNERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*operands.values())
    # Kernels of Mosaic GPU know nothing of manual mesh axes.
    dquery, dkey, dvalue, delta = (vary_as(query, x) for x in results)
    return dquery, dkey, dvalue, -delta[..., :length]


def key_tile(block, owner):
    """A warpgroup's tile of keys, of those that a tile of queries sees; from -REACH on."""
    return block - lax.rem(block - owner + OWNERS, jnp.int32(OWNERS))


def key_slot(tile):
    """Where a tile of keys is in shared memory."""
    return lax.rem(tile + KEY_SLOTS, jnp.int32(KEY_SLOTS))


def stretch_length(blocks: int, pairs: int, processors: int) -> int:
    """Tiles of a program's stretch: those that keep the processors busy for the shortest time."""

    def cost(stretch):
        programs = pairs * -(-blocks // stretch)
        return -(-programs // processors) * (min(stretch, blocks) + REACH), programs

    return min(range(1, blocks + 1), key=cost)
