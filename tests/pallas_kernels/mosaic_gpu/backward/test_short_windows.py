"""Which tiles the backward kernel for short windows has at hand."""

import itertools

import jax.numpy as jnp
import pytest

from pallas_kernels._mosaic_gpu.backward.short_windows import (
    KEY_SLOTS,
    LONGEST_WINDOW,
    OWNERS,
    REACH,
    TILE,
    key_slot,
    key_tile,
    stretch_length,
)


def owned(block):
    """The tiles of keys of all warpgroups at a tile of queries."""
    return [int(key_tile(jnp.int32(block), owner)) for owner in range(OWNERS)]


def test_all_keys_of_a_window_are_at_hand():
    for block in range(9):
        assert sorted(owned(block)) == list(range(block - REACH, block + 1))
        assert block * TILE - LONGEST_WINDOW >= (block - REACH) * TILE


def test_a_warpgroup_keeps_its_tile_until_no_query_sees_it():
    for owner in range(OWNERS):
        tiles = [owned(block)[owner] for block in range(12)]
        for block, (before, after) in enumerate(itertools.pairwise(tiles)):
            assert after == (before if block + 1 <= before + REACH else block + 1)


def test_the_next_tile_of_keys_takes_no_slot_in_use():
    for block in range(9):
        in_flight = [int(key_slot(jnp.int32(tile))) for tile in (*owned(block), block + 1)]
        assert sorted(in_flight) == list(range(KEY_SLOTS))


@pytest.mark.parametrize(
    ("blocks", "pairs", "waves"), [(512, 8, 1), (64, 8, 1), (1, 3, 1), (5, 200, 2), (31, 131, 1)]
)
def test_stretches_keep_the_processors_busy(blocks, pairs, waves):
    stretch = stretch_length(blocks, pairs, 132)
    programs = pairs * -(-blocks // stretch)
    assert 1 <= stretch <= blocks and -(-programs // 132) == waves
    ideal = blocks * pairs / 132
    assert waves * (stretch + REACH) <= 2 * max(ideal, 1) + REACH + 1
