"""A program of `backward_dkv`: it has a tile of keys, and loops over the queries that see them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._masks import sees_except_distant_sinks
from pallas_kernels._spec import Spec, minus
from pallas_kernels._tile_ranges import QueryColumns
from pallas_kernels._triton.blocks import load_rows, real_keys, store_rows
from pallas_kernels._triton.query_tiles import (
    KeySums,
    add_gradients,
    load_queries,
    scaled_gradients,
    zero_gradients,
)
from pallas_kernels._triton.tiles import TritonTiles


class DkvProgram(NamedTuple):
    """What a program does: the gradients of a tile of keys and values.

    Attributes:
        spec: static settings.
        offset: position of the run's first key.
        length: keys of the run.
        rows: number of queries.
        group: query heads of a head of keys.
        packed: whether there are documents.
        num_sinks: sinks to look for in the run.
        min_distance: of distant queries, whose sinks have a launch of their own.
        distant_chunk: queries of a chunk of that launch.
        dims: H and Hv.
        tiles: tile sizes.
        wanted: which of dkey and dvalue to compute.
        interpret: run in the interpreter.
    """

    spec: Spec
    offset: int
    length: int
    rows: int
    group: int
    packed: bool
    num_sinks: int
    min_distance: int
    distant_chunk: int
    dims: tuple[int, int]
    tiles: TritonTiles
    wanted: tuple[bool, bool]
    interpret: bool

    def run(self, refs: dict[str, Any], *out_refs: Any) -> None:
        """Computes the gradients of a tile of keys."""
        index = pl.program_id(0)
        first_key = index * self.tiles.key
        local = first_key + jnp.arange(self.tiles.key, dtype=jnp.int32)
        exists = local < self.length if self.length % self.tiles.key else None
        key_rows = (pl.ds(first_key, self.tiles.key),)
        keys = [load_rows(ref, key_rows, exists) for ref in refs["keys"]]
        results = scaled_gradients(self.spec, self._sums(refs, index, keys, local), self.wanted)
        if "from_distant" in refs:
            results = self._add_from_distant_queries(refs, local, results)
        if self.packed:
            real = real_keys(refs, self.spec, self.offset, local, exists)[:, None]
            results = [[jnp.where(real, x, 0.0) for x in result] for result in results]
        for out_ref, result in zip(out_refs, results, strict=True):
            store_rows(out_ref, key_rows, result, exists)

    def _sums(
        self, refs: dict[str, Any], index: Array, keys: list[list[Array]], local: Array
    ) -> KeySums:
        """(dkey / scale, dvalue) of the keys ``local`` through the queries of the plan."""
        tiles = self.tiles
        j = self.offset + local[:, None]

        def seen(i, start, end):
            return sees_except_distant_sinks(
                i, j, start, self.spec.window, self.num_sinks, self.min_distance,
                packed=self.packed, end=end,
            )  # fmt: skip

        def over(begin, end, acc, masked, padded=False):
            def body(begin, block, acc):
                mask = seen if masked else None
                tile = load_queries(
                    refs, tiles, begin, self.rows, block, mask, packed=self.packed, padded=padded
                )
                return add_gradients(self.spec, keys, tile, acc, self.wanted, self.interpret)

            head_blocks = self.group // tiles.heads
            return _over_query_tiles(begin, end, tiles.query, head_blocks, body, acc)

        acc = zero_gradients(tiles.key, self.dims, self.wanted)
        begin, unmasked_begin, unmasked_end, end = (
            refs["plan"][index, n] for n in QueryColumns.ALL
        )
        if self.packed:
            # Loads that leave padding out wait for starts first, so that queries arrive late. So a
            # tile takes such loads only if its queries include padding, then for all of them.
            stop = jnp.where(refs["plan"][index, QueryColumns.HAS_PADDING] > 0, end, begin)
            acc = over(begin, stop, acc, True, padded=True)
            begin, unmasked_begin, unmasked_end = (
                jnp.maximum(x, stop) for x in (begin, unmasked_begin, unmasked_end)
            )
        if not tiles.unmasked_loop:
            return over(begin, end, acc, True)
        acc = over(begin, unmasked_begin, acc, True)
        acc = over(unmasked_begin, unmasked_end, acc, False)
        return over(unmasked_end, end, acc, True)

    def _add_from_distant_queries(
        self, refs: dict[str, Any], local: Array, results: list[list[Array]]
    ) -> list[list[Array]]:
        """Adds what chunks of distant queries found for the sinks among the keys ``local``."""
        index, num_sinks = pl.program_id(0), self.num_sinks

        def add_chunk(c, results):
            chunk_start = refs["start"][c * self.distant_chunk if self.packed else 0]
            first_sink = minus(chunk_start, self.offset)
            row = local - jnp.maximum(first_sink, 0)
            own = (row >= 0) & (row < num_sinks)
            parts = (
                load_rows(ref, (c, jnp.clip(row, 0, num_sinks - 1)), own)
                for ref in refs["from_distant"]
            )
            return [
                [x + y for x, y in zip(result, part, strict=True)]
                for result, part in zip(results, parts, strict=True)
            ]

        first_chunk, end_chunk = refs["chunks"][index, 0], refs["chunks"][index, 1]
        return lax.fori_loop(first_chunk, end_chunk, add_chunk, results)


def _over_query_tiles(
    begin: Array, end: Array, size: int, head_blocks: int, body: Callable, acc: Any
) -> Any:
    """``acc = body(first query, block of heads, acc)`` for tiles of all heads of the group.

    One loop over both, as a loop in a loop would fill its pipeline of loads again and again.
    """
    count = end - begin
    inverse = 1 / count.astype(jnp.float32)

    def step(n, acc):
        block = jnp.int32(0)
        if head_blocks > 1:
            # Exact for so few numbers, and much faster than to divide integers.
            block = ((n.astype(jnp.float32) + 0.5) * inverse).astype(jnp.int32)
            n = n - block * count
        return body((begin + n) * size, block, acc)

    return lax.fori_loop(0, count * head_blocks, step, acc)
