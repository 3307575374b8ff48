"""The end of a tile of queries in the forward kernel: results are scaled, rounded and stored."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels._logits import LOG2_E, LOWEST
from pallas_kernels._mosaic_gpu.forward.config import ForwardConfig
from pallas_kernels._mosaic_gpu.forward.work_tile import WorkTile
from pallas_kernels._mosaic_gpu.primitives import COLUMN, MATRIX, broadcast_column, load_as


class Epilogue:
    """Writes a warpgroup's rows of a tile, through shared memory and TMA."""

    def __init__(
        self,
        config: ForwardConfig,
        outputs: tuple[Any, Any],
        smem: dict[str, Any],
        barriers: Any,
        warpgroup: Array,
    ):
        self.config, self.warpgroup = config, warpgroup
        self.out, self.lse = outputs
        self.smem, self.barriers = smem, barriers

    def write(
        self,
        tile: WorkTile,
        stage: Array,
        row_max: Array,
        row_sum: Array,
        acc: Array,
        sink_logits: Array | None,
    ) -> None:
        """Writes ``acc / row_sum`` and the log-sum-exp, continued from what is there if asked to.

        Args:
            tile: of queries.
            stage: that of its queries, whose shared memory the results may take.
            row_max: of each row, in base 2.
            row_sum: of the weights relative to ``row_max``.
            acc: sums of the weighted values.
            sink_logits: the learned sink of each row, or None.
        """
        config = self.config
        if config.out_in_query_smem:
            out_smem = self.smem["query"].at[stage, self.warpgroup]
        else:
            out_smem = self.smem["out"].at[self.warpgroup]
        lse_smem = self.smem["lse"].at[self.warpgroup]
        rows = self._rows(tile)
        weight_before = row_sum
        if not config.out_in_query_smem:
            # Until the copies of the tile before have read this memory. The queries' memory is
            # free: `Consumer` waits for its copies before it lets the producer fill it.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if config.resume:
            row_max, row_sum, acc, weight_before = self._resume(tile, rows, row_max, row_sum, acc)
        numerator: Array | float = 1.0
        if sink_logits is not None:
            row_max, row_sum, numerator = _with_sink_logits(row_max, row_sum, sink_logits)
        has_keys = row_sum > 0
        inverse = jnp.where(has_keys, numerator / row_sum, 0.0)
        lse_smem[...] = jnp.where(has_keys, row_max / LOG2_E + jnp.log(row_sum), -jnp.inf)
        width = config.out_columns
        for first in range(0, config.value_dim, width):
            columns = pl.ds(first, width)
            if first:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            result = acc if width == config.value_dim else acc[:, first : first + width]
            if config.resume:
                self._fetch(self.out, out_smem, tile, rows, columns)
                result += load_as(out_smem, MATRIX) * broadcast_column(weight_before, width)
            out_smem[...] = (result * broadcast_column(inverse, width)).astype(config.out_dtype)
            plgpu.commit_smem()
            self._copy(out_smem, self.out, tile, rows, columns)
            if not first:
                self._store_lse(lse_smem, tile, rows)
            plgpu.commit_smem_to_gmem_group()

    def _store_lse(self, smem: Any, tile: WorkTile, rows: Any) -> None:
        """Stores the log-sum-exp of a warpgroup's rows, unless all are behind the last query.

        Pallas stores a vector by a plain copy of bytes. Such a copy does not stop at the end of a
        head's row, as the copies of matrices do: it would go on into the next head's row.
        """
        store = partial(self._copy, smem, self.lse, tile, rows)
        stored = self.lse.shape[-1]
        if stored % self.config.scheduler.positions_per_tile == 0:
            store()
        else:
            pl.when(rows.start < stored)(store)

    def _copy(self, smem: Any, ref: Any, tile: WorkTile, rows: Any, *columns: Any) -> None:
        """Copies a warpgroup's rows of a tile, of all heads, to global memory."""
        for head, part in self._heads(smem):
            dst = _gmem(ref, tile, rows, head, *columns)
            plgpu.copy_smem_to_gmem(part, dst, commit_group=False)

    def _resume(
        self, tile: WorkTile, rows: Any, row_max: Array, row_sum: Array, acc: Array
    ) -> tuple[Array, Array, Array, Array]:
        """(row_max, row_sum, accumulator, weight of the output before) with the state before."""
        lse_smem = self.smem["lse"].at[self.warpgroup]
        self._fetch(self.lse, lse_smem, tile, rows)
        lse = load_as(lse_smem, COLUMN)
        had_keys = lse > -jnp.inf
        max_before = jnp.where(had_keys, lse * LOG2_E, LOWEST)
        new_max = jnp.maximum(row_max, max_before)
        weight_before = jnp.where(had_keys, jnp.exp2(max_before - new_max), 0.0)
        correction = jnp.exp2(row_max - new_max)
        row_sum = row_sum * correction + weight_before
        acc = acc * broadcast_column(correction, self.config.value_dim)
        return new_max, row_sum, acc, weight_before

    def _fetch(self, ref: Any, smem: Any, tile: WorkTile, rows: Any, *columns: Any) -> None:
        """Fetches a warpgroup's rows of a tile, of all heads, and waits for them."""
        barrier = self.barriers["state"].at[self.warpgroup]
        for head, part in self._heads(smem):
            plgpu.copy_gmem_to_smem(_gmem(ref, tile, rows, head, *columns), part, barrier)
        plgpu.barrier_wait(barrier)

    def _heads(self, smem: Any) -> Iterator[tuple[int, Any]]:
        """The rows of each head of a tile."""
        positions = self.config.scheduler.positions_per_warpgroup
        for head in range(self.config.tiles.heads):
            yield head, smem.at[pl.ds(head * positions, positions)]

    def _rows(self, tile: WorkTile) -> Any:
        """The positions of a warpgroup in a tile, of each head."""
        positions = self.config.scheduler.positions_per_warpgroup
        return pl.ds(tile.first_position(self.warpgroup), positions)


def _with_sink_logits(
    row_max: Array, row_sum: Array, sink_logits: Array
) -> tuple[Array, Array, Array]:
    """(row_max, row_sum, correction of the accumulator) with one more key, whose value is zero."""
    sink_logits = sink_logits * LOG2_E
    new_max = jnp.maximum(row_max, sink_logits)
    correction = jnp.exp2(row_max - new_max)
    return new_max, row_sum * correction + jnp.exp2(sink_logits - new_max), correction


def _gmem(ref: Any, tile: WorkTile, rows: Any, head: int, *columns: Any) -> Any:
    """A head's rows of a tile: of [B, T, N, Hv] where columns are given, else of [B, N, T]."""
    index = (rows, tile.first_head + head)
    return ref.at[tile.batch_row, *(index if columns else index[::-1]), *columns]
