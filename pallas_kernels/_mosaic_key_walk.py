"""Walks of the fused Mosaic GPU backward kernels over tiles of queries, and all but their matrices.

A program has one tile of keys and takes the tiles of queries that see them, of all heads of the
group. Two warpgroups compute. One more fetches queries and the gradients of outputs through TMA;
another one adds the gradients of queries to what other tiles of keys have added, in float32 in
global memory.

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

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _mosaic_dquery
from pallas_kernels._band import key_tiles_of_queries, query_plan, sees
from pallas_kernels._mosaic_blocks import MATRIX, ROW, ROWS, fori, fresh, load, tell_and_wait
from pallas_kernels._mosaic_gradients import across, of_queries
from pallas_kernels._spec import KeyRun, Spec, Starts, vary_as

QUERIES = ROWS
"""Queries of a tile."""
SIDE = 16
"""Heads side by side without a window: so few that several programs share one's queries."""


class KeyWalk:
    """Walks of programs that have ``key_tile`` keys each.

    Args:
        spec: static settings.
        query: queries of the shard.
        run: keys.
        start: where the sequence of each query starts.
        dout: cotangent of the output.
        lse: log-sum-exp over all keys of a query.
        delta: rowsum of the output times its cotangent.
        rows: number of queries.
        key_tile: keys of a program.
        columns: of the parts in which gradients of queries are added.
        ordered: whether they are added in a fixed order.
    """

    def __init__(
        self,
        spec: Spec,
        query: Array,
        run: KeyRun,
        start: Starts,
        dout: Array,
        lse: Array,
        delta: Array,
        *,
        rows: int,
        key_tile: int,
        columns: int,
        ordered: bool,
    ):
        self.spec, self.run, self.key_tile, self.ordered = spec, run, key_tile, ordered
        self.batch, length, self.heads, self.dim = query.shape
        _, self.keys, self.num_kv, _ = run.value.shape
        self.query = query
        self.group = self.heads // self.num_kv
        self.packed = start.ndim > 0
        self.blocks = -(-rows // QUERIES)
        self.key_tiles = -(-self.keys // key_tile)
        self.pairs = self.num_kv * self.batch
        plan = query_plan(
            start, spec.window, 0, rows=rows, query_tile=QUERIES,
            offset=run.offset, length=self.keys, key_tile=key_tile, reach=0,
        )  # fmt: skip
        plan = plan if self.packed else plan[None]
        first, last = key_tiles_of_queries(plan, self.blocks)
        self.seen = first <= last
        self.longest_first = spec.window is None and not self.packed
        self.side = max(1, SIDE // self.group) if self.longest_first else None
        self.operands: dict[str, Any] = {
            "query": query,
            "dout": dout,
            **of_queries(spec, lse, delta, self.blocks * QUERIES),
            "key": run.key,
            "value": run.value,
            "plan": plan,
            "leader": first if self.longest_first else last,
        }
        if self.packed:
            pad = ((0, 0), (0, -length % QUERIES))
            self.operands["start"] = jnp.pad(start, pad, mode="edge")
        self.dquery_tile = (self.dim // columns, *_mosaic_dquery.tile_shape(columns))

    def place(self):
        """(row, key/value head, tile of keys) of a program."""
        index = lax.axis_index("program")
        pair, tile = task(index, self.key_tiles, self.pairs, self.side)
        return lax.div(pair, jnp.int32(self.num_kv)), lax.rem(pair, jnp.int32(self.num_kv)), tile

    def fold(self, refs: dict[str, Any], step: Callable[..., Any], carry: Any) -> Any:
        """Folds ``step(head, block, clear, number, carry)`` over a program's tiles of queries."""
        row, kv_head, tile = self.place()
        begin, clear_begin, clear_end, end = (
            refs["plan"][row if self.packed else 0, tile, n] for n in range(4)
        )
        count, size = end - begin, self.key_tile
        beside = None
        if self.packed and not self.run.offset:
            of_last_key = refs["start"][row, jnp.minimum(tile * size + size, self.keys) - 1]
            beside = jnp.where(of_last_key > tile * size, size // QUERIES, 0)

        def visit(number, state):
            member, n, carry = state
            block = end - 1 - n if self.longest_first else begin + n
            clear = (block >= clear_begin) & (block < clear_end)
            carry = step(kv_head * self.group + member, block, clear, number, carry)
            if self.longest_first:
                member, n = following_down(member, n, self.group)
            else:
                member, n = following(member, n, self.group, count, beside)
            return member, n, carry

        zero = jnp.int32(0)
        return fori(0, count * self.group, visit, (zero, zero, carry))[2]

    def mask(self, start_smem: Any, first_key: Array, block: Array, weights: Array) -> Array:
        """Weights of `ROWS` keys from a position on, zero where queries do not see them."""
        j = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 0, layout=MATRIX)
        i = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 1, layout=MATRIX)
        i, j = i * fresh(1) + block * QUERIES, j + first_key
        starts = across(load(start_smem, ROW)) if self.packed else None
        seen = sees(i, j, starts, self.spec.window, 0, packed=self.packed)
        if self.keys % self.key_tile:
            seen &= j < self.run.offset + self.keys
        return jnp.where(seen, weights, 0.0)

    def fetch(self, refs, smem, barriers, slots: dict[str, int], names: dict[str, list[str]]):
        """Fetches keys and values, and for each step what has ``names`` into so many ``slots``."""
        row, kv_head, tile = self.place()
        for name in ("key", "value"):
            source = refs[name].at[row, pl.ds(tile * self.key_tile, self.key_tile), kv_head]
            plgpu.copy_gmem_to_smem(source, smem[name], barriers["key"])

        def step(head, block, clear, number, _):
            del clear
            where = pl.ds(block * QUERIES, QUERIES)
            sources = {
                "query": (row, where, head),
                "dout": (row, where, head),
                "shift": (row, head, where),
                "delta": (row, head, where),
                "start": (row, where),
            }
            for barrier, members in names.items():
                slot = slot_of(number, slots[barrier])
                plgpu.barrier_wait(barriers[barrier + "_free"].at[slot])
                for name in members:
                    source, there = refs[name].at[sources[name]], smem[name].at[slot]
                    plgpu.copy_gmem_to_smem(source, there, barriers[barrier].at[slot])

        self.fold(refs, step, None)

    def add(self, refs, smem, barriers, units: Callable[[Array], list[tuple[Any, Any]]]):
        """Adds the gradients of queries to what other programs have added, or stores the first.

        A counter of each tile of queries says how many have added; where they add in any order,
        whether the first has stored. ``units`` says in which places of shared memory a step leaves
        which parts.
        """
        row, _, tile = self.place()

        def step(head, block, clear, number, previous):
            del clear
            # The tiles of keys that see a tile of queries are consecutive.
            before = jnp.abs(refs["leader"][row if self.packed else 0, block] - tile)
            before = before if self.ordered else jnp.minimum(before, 1)
            *there, tells = previous
            counter = refs["counter"]
            tell_and_wait(counter.at[row, *there], tells, counter.at[row, head, block], before)

            def free(place, behind):
                """Tells that all parts but those of so many copies behind are out of there."""
                plgpu.wait_smem_to_gmem(behind, wait_read_only=True)
                plgpu.barrier_arrive(barriers["dquery_free"].at[place])

            sent = None
            for place, part in units(number):
                plgpu.barrier_wait(barriers["dquery"].at[place])
                there = refs["dquery"].at[row, head, block]
                there = there if part is None else there.at[part]

                def send(reduction, source=smem["dquery"].at[place], there=there):
                    plgpu.copy_smem_to_gmem(
                        source, there, commit_group=False, reduction_op=reduction
                    )

                pl.when(before == 0)(partial(send, None))
                pl.when(before > 0)(partial(send, "add"))
                plgpu.commit_smem_to_gmem_group()
                if sent is not None:
                    free(sent, 1)
                sent = place
            free(sent, 0)
            return head, block, jnp.int32(1 if self.ordered else before == 0)

        *there, tells = self.fold(refs, step, (jnp.int32(0),) * 3)
        counter = refs["counter"].at[row, *there]
        tell_and_wait(counter, tells, counter, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def launch(
        self,
        compute: Callable[..., None],
        fetch: Callable[..., None],
        add: Callable[..., None],
        smem: dict[str, Any],
        barriers: dict[str, Any],
        dkey_dtype: jnp.dtype,
    ) -> tuple[_mosaic_dquery.Total, Array, Array]:
        """Runs ``compute(refs, smem, barriers, warpgroup)`` and so on side by side.

        Returns:
            dquery, to be finished; dkey; dvalue.
        """
        queries = self.batch, self.heads, self.blocks
        outputs = {
            "dquery": jax.ShapeDtypeStruct((*queries, *self.dquery_tile), jnp.float32),
            "dkey": jax.ShapeDtypeStruct(self.run.key.shape, dkey_dtype),
            "dvalue": jax.ShapeDtypeStruct(self.run.value.shape, dkey_dtype),
        }
        operands = self.operands | {"counter": jax.new_ref(jnp.zeros(queries, jnp.int32))}

        def ring_swa_backward_fused(*refs):
            inputs = dict(zip((*operands, *outputs), refs, strict=True))

            def body(smem, barriers):
                me = lax.axis_index("warpgroup")

                @pl.when(me < 2)
                def computing():
                    plgpu.set_max_registers(232, action="increase")
                    compute(inputs, smem, barriers, me)

                @pl.when(me == 2)
                def fetching():
                    plgpu.set_max_registers(24, action="decrease")
                    fetch(inputs, smem, barriers)

                @pl.when(me == 3)
                def adding():
                    plgpu.set_max_registers(24, action="decrease")
                    # At first all shared memory is free.
                    for place in range(smem["dquery"].shape[0]):
                        plgpu.barrier_arrive(barriers["dquery_free"].at[place])
                    add(inputs, smem, barriers)

            pl.run_scoped(body, smem, barriers, collective_axes="warpgroup")

        results = plgpu.kernel(
            ring_swa_backward_fused,
            out_type=tuple(outputs.values()),
            grid=(self.key_tiles * self.pairs,),
            grid_names=("program",),
            num_threads=4,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
        )(*operands.values())
        # Kernels of Mosaic GPU know nothing of manual mesh axes.
        parts, dkey, dvalue = (vary_as(self.query, x) for x in results)
        return _mosaic_dquery.Total(parts, self.seen), dkey, dvalue


def slot_of(number: Array, slots: int) -> Array:
    """Where the arrays of a step are, of so many places."""
    return lax.rem(number, jnp.int32(slots))


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
