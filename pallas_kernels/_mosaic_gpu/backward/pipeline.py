"""What the fused Mosaic GPU backward kernels do beside their matrices.

A program goes its way over tiles of queries (`pallas_kernels._mosaic_key_path`). Two warpgroups
compute. One more fetches queries and the gradients of outputs through TMA; another one adds the
gradients of queries to what other tiles of keys have added (`pallas_kernels._mosaic_adding`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._kernels import Queries
from pallas_kernels._masks import sees
from pallas_kernels._mosaic_gpu import register_tiles
from pallas_kernels._mosaic_gpu.backward import dkv_reduce, dq_postprocess
from pallas_kernels._mosaic_gpu.backward.scheduler import (
    QUERIES,
    Path,
    Paths,
    cut_at_the_end,
    fold,
    slot_of,
    with_own_queries,
)
from pallas_kernels._mosaic_gpu.backward.softmax import of_queries
from pallas_kernels._mosaic_gpu.primitives import MATRIX, ROW, ROWS, across, fresh, load
from pallas_kernels._spec import KeyRun, Spec
from pallas_kernels._tile_ranges import query_plan, seen_tiles
from pallas_kernels._varying import vary_as


class KeyWalk:
    """Walks of programs that have ``key_tile`` keys each.

    Args:
        spec: static settings.
        queries: queries of the shard, and what belongs to them.
        run: keys.
        rows: number of queries.
        key_tile: keys of a program.
        columns: of the parts in which gradients of queries are added.
        processors: multiprocessors of the GPU.
        ordered: whether they are added in a fixed order.
        rounding: what the program that adds last makes of them; if None, they are to be finished.
    """

    def __init__(
        self,
        spec: Spec,
        queries: Queries,
        run: KeyRun,
        *,
        rows: int,
        key_tile: int,
        columns: int,
        processors: int,
        ordered: bool,
        rounding: dq_postprocess.Rounding | None = None,
    ):
        query, dout, lse, delta, start = queries
        self.spec, self.run, self.query = spec, run, query
        self.ordered, self.rounding = ordered, rounding
        self.batch, length, self.heads, self.dim = query.shape
        _, keys, num_kv, _ = run.value.shape
        self.packed = start.ndim > 0
        has_own = run.offset + keys > 0
        assert not has_own or run.offset % key_tile == 0
        paths = Paths(
            num_kv=num_kv,
            group=self.heads // num_kv,
            pairs=num_kv * self.batch,
            key_tile=key_tile,
            keys=keys,
            key_tiles=-(-keys // key_tile),
            blocks=-(-rows // QUERIES),
            before_own=-run.offset // key_tile if has_own else -(-keys // key_tile),
            packed=self.packed,
            window=spec.window,
        )
        self.paths = cut_at_the_end(paths, run.offset, processors)
        plan = query_plan(
            start, spec.window, 0, rows=rows, query_tile=QUERIES,
            offset=run.offset, length=keys, key_tile=key_tile, reach=0,
        )  # fmt: skip
        plan = plan if self.packed else plan[None]
        plan = with_own_queries(plan, self.paths)
        self.seen = seen_tiles(plan, self.paths.blocks)
        self.operands: dict[str, Any] = {
            "query": query,
            "dout": dout,
            **of_queries(spec, lse, delta, self.paths.blocks * QUERIES),
            "key": run.key,
            "value": run.value,
            "plan": plan,
        }
        if self.packed:
            pad = ((0, 0), (0, -length % QUERIES))
            self.operands["start"] = jnp.pad(start, pad, mode="edge")
        if rounding is not None:
            assert ordered and has_own and not self.paths.longest_first
        self.dquery_tile = (self.dim // columns, *register_tiles.tile_shape(columns))

    def path(self, refs: dict[str, Any]) -> Path:
        """A program's way."""
        return Path(self.paths, lax.axis_index("program"), refs["plan"], refs.get("start"))

    def mask(self, start_smem: Any, first_key: Array, block: Array, weights: Array) -> Array:
        """Weights of `ROWS` keys from a position on, zero where queries do not see them."""
        j = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 0, layout=MATRIX)
        i = plgpu.broadcasted_iota(jnp.int32, (ROWS, QUERIES), 1, layout=MATRIX)
        i, j = i * fresh(1) + block * QUERIES, j + first_key
        starts = across(load(start_smem, ROW)) if self.packed else None
        seen = sees(i, j, starts, self.spec.window, 0, packed=self.packed)
        if self.paths.keys % self.paths.key_tile:
            seen &= j < self.run.offset + self.paths.keys
        return jnp.where(seen, weights, 0.0)

    def fetch(self, refs, smem, barriers, slots: dict[str, int], names: dict[str, list[str]]):
        """Fetches keys and values, and for each step what has ``names`` into so many ``slots``."""
        path, size = self.path(refs), self.paths.key_tile
        for name in ("key", "value"):
            source = refs[name].at[path.row, pl.ds(path.tile * size, size), path.kv_head]
            plgpu.copy_gmem_to_smem(source, smem[name], barriers["key"])

        def step(head, block, number, _):
            where = pl.ds(block * QUERIES, QUERIES)
            sources = {
                "query": (path.row, where, head),
                "dout": (path.row, where, head),
                "shift": (path.row, head, where),
                "delta": (path.row, head, where),
                "start": (path.row, where),
            }
            for barrier, members in names.items():
                slot = slot_of(number, slots[barrier])
                plgpu.barrier_wait(barriers[barrier + "_free"].at[slot])
                for name in members:
                    source, there = refs[name].at[sources[name]], smem[name].at[slot]
                    plgpu.copy_gmem_to_smem(source, there, barriers[barrier].at[slot])

        fold(path, step, None)

    def launch(
        self,
        compute: Callable[..., None],
        fetch: Callable[..., None],
        add: Callable[..., None],
        smem: dict[str, Any],
        barriers: dict[str, Any],
        dkey_dtype: jnp.dtype,
    ) -> tuple[Array, Array, Array]:
        """Runs ``compute(refs, smem, barriers, warpgroup)`` and so on side by side.

        Returns:
            The sums of a `dq_postprocess.Total`, or with `rounding` dquery; dkey; dvalue.
        """
        queries = self.batch, self.heads, self.paths.blocks
        outputs = {
            "dquery": jax.ShapeDtypeStruct((*queries, *self.dquery_tile), jnp.float32),
            "dkey": jax.ShapeDtypeStruct(self.run.key.shape, dkey_dtype),
            "dvalue": jax.ShapeDtypeStruct(self.run.value.shape, dkey_dtype),
        }
        if self.rounding is not None:
            outputs["out"] = self.rounding.out_type
        dims = {"dkey": self.dim, "dvalue": self.run.value.shape[3]}
        sums = dkv_reduce.sums(self.paths, dims)
        counters = {"counter": queries} | dkv_reduce.counters(self.paths)
        operands = self.operands | {
            name: jax.new_ref(jnp.zeros(shape, jnp.int32)) for name, shape in counters.items()
        }

        def ring_swa_backward_fused(*refs):
            inputs = dict(zip((*operands, *outputs, *sums), refs, strict=True))

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
                    add(inputs, smem, barriers)

            pl.run_scoped(body, smem, barriers, collective_axes="warpgroup")

        results = plgpu.kernel(
            ring_swa_backward_fused,
            out_type=(*outputs.values(), *sums.values()),
            grid=(self.paths.programs,),
            grid_names=("program",),
            num_threads=4,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
        )(*operands.values())
        # Kernels of Mosaic GPU know nothing of manual mesh axes.
        found = dict(zip((*outputs, *sums), (vary_as(self.query, x) for x in results), strict=True))
        dquery = found["dquery"] if self.rounding is None else self.rounding.whole(found["out"])
        return dquery, found["dkey"], found["dvalue"]
