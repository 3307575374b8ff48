"""Tiles of matrices of pairs, by brute force."""

import numpy as np


def tiled(x, axis, tile):
    """Splits an axis into tiles, the last one filled up with False."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % tile)
    x = np.pad(x, padding)
    return x.reshape(*x.shape[:axis], -1, tile, *x.shape[axis + 1 :])


def tiles_with(seen, query_tile, key_tile):
    """[batch, query tiles, key tiles]: which hold a pair."""
    return tiled(tiled(seen, 2, key_tile), 1, query_tile).any((2, 4))


def full_tiles(seen, query_tile, key_tile):
    """[batch, query tiles, key tiles]: which have all their rows and hold nothing but pairs."""
    return tiled(tiled(seen, 2, key_tile), 1, query_tile).all((2, 4))


def covered(begin, end, count):
    """[..., count]: which tiles lie in a half-open range."""
    tile = np.arange(count)
    return (begin[..., None] <= tile) & (tile < end[..., None])


def assert_useful(visited, useful, padded):
    """No useful tile is missed, and none visited for nothing but where there is padding."""
    assert not (useful & ~visited).any(), "a tile with pairs is not visited"
    assert not (visited & ~useful & ~padded).any(), "a tile without pairs is visited"
