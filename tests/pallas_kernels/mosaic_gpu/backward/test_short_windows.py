"""Which tiles a program of the backward kernel for short windows has in shared memory."""

import itertools

import jax.numpy as jnp
import pytest

from pallas_kernels._mosaic_gpu.backward.short_windows_schedule import (
    CONSUMERS,
    KEY_SLOTS,
    LONGEST_WINDOW,
    MAX_TILES_BACK,
    TILE,
    chunk_tiles,
    key_block_of,
    key_slot,
)


def key_blocks(query_block):
    """The tiles of keys of all consumers at a tile of queries."""
    block = jnp.int32(query_block)
    return [int(key_block_of(block, consumer)) for consumer in range(CONSUMERS)]


def test_the_consumers_have_all_keys_of_a_window():
    for block in range(9):
        assert sorted(key_blocks(block)) == list(range(block - MAX_TILES_BACK, block + 1))
        assert block * TILE - LONGEST_WINDOW >= (block - MAX_TILES_BACK) * TILE


def test_a_consumer_keeps_its_keys_until_no_query_sees_them():
    for consumer in range(CONSUMERS):
        tiles = [key_blocks(block)[consumer] for block in range(12)]
        for block, (before, after) in enumerate(itertools.pairwise(tiles)):
            assert after == (before if block + 1 <= before + MAX_TILES_BACK else block + 1)


def test_the_next_tile_of_keys_takes_no_slot_in_use():
    for block in range(9):
        slots = [int(key_slot(jnp.int32(tile))) for tile in (*key_blocks(block), block + 1)]
        assert sorted(slots) == list(range(KEY_SLOTS))


@pytest.mark.parametrize(
    ("num_tiles", "kv_heads", "waves"),
    [(512, 8, 1), (64, 8, 1), (1, 3, 1), (5, 200, 2), (31, 131, 1)],
)
def test_chunks_keep_the_multiprocessors_busy(num_tiles, kv_heads, waves):
    chunk = chunk_tiles(num_tiles, kv_heads, 132)
    programs = kv_heads * -(-num_tiles // chunk)
    assert 1 <= chunk <= num_tiles and -(-programs // 132) == waves
    ideal = num_tiles * kv_heads / 132
    assert waves * (chunk + MAX_TILES_BACK) <= 2 * max(ideal, 1) + MAX_TILES_BACK + 1
