"""The arrays around the backward kernel for sinks beyond windows."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels._masks import sees_beyond_window
from pallas_kernels._mosaic_gpu.backward.sinks import (
    SHORTEST_WINDOW,
    add_to_own,
    sinks_of_chunks,
    sum_of_fetched,
)
from pallas_kernels._mosaic_gpu.backward.sinks_kernel import chunk_length
from pallas_kernels._spec import KeyRun, SinkRun

BATCH, KV_HEADS, DIM = 2, 2, 3


def shard(seed):
    """(window, sinks, [B, T] starts) of a shard whose first sequence may have begun before it."""
    rng = random.Random(seed)
    window, num_sinks = rng.choice([63, 64, 127, 200, 600]), rng.choice([1, 4, 9, 64])
    length = rng.randint(2, 6) * chunk_length(window) - 8 * rng.randint(0, 7)
    starts = np.full((BATCH, length), -rng.choice([0, 2, 5, 1000]), np.int64)
    for row in starts:
        for begin in sorted(rng.sample(range(length), rng.randint(0, 4))):
            row[begin:] = begin
        if rng.random() < 0.5:  # padding
            begin = rng.randrange(length)
            row[begin:] = length
    return window, num_sinks, starts


def seen_sinks(window, num_sinks, starts):
    """(row, query, slot) of all sinks that are seen beyond a window."""
    i = jnp.arange(starts.shape[1])[:, None]
    for row, start in enumerate(jnp.asarray(starts)[..., None]):
        j = start + jnp.arange(num_sinks)
        seen = np.asarray(sees_beyond_window(i, j, start, window, num_sinks))
        for query, slot in np.argwhere(seen):
            yield row, query, slot


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), *range(1, 5)])
def test_a_chunk_has_the_sinks_that_its_queries_see_beyond_their_windows(seed):
    window, num_sinks, starts = shard(seed)
    length, chunk = starts.shape[1], chunk_length(window)
    rng = np.random.default_rng(seed)
    key, value = rng.standard_normal((2, BATCH, length, KV_HEADS, DIM))
    fetched = rng.standard_normal((2, BATCH, num_sinks, KV_HEADS, DIM))
    found = sinks_of_chunks(
        num_sinks,
        jnp.asarray(starts[:, ::chunk]),
        KeyRun(jnp.asarray(key), jnp.asarray(value), 0),
        SinkRun(*map(jnp.asarray, fetched)),
        jnp.asarray(starts),
    )
    for n, own in enumerate((key, value)):
        for row, query, slot in seen_sinks(window, num_sinks, starts):
            position = starts[row, query] + slot
            expected = fetched[n, row, slot] if position < 0 else own[row, position]
            assert np.allclose(found[n][row, query // chunk, :, slot], expected)


@pytest.mark.parametrize("seed", range(5))
def test_gradients_by_chunks_are_added_to_those_of_their_sinks(seed):
    window, num_sinks, starts = shard(seed)
    length, chunk = starts.shape[1], chunk_length(window)
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((BATCH, length, KV_HEADS, DIM))
    by_chunks = np.zeros((BATCH, -(-length // chunk), num_sinks, KV_HEADS, DIM))
    own, fetched = gradients.copy(), np.zeros((BATCH, num_sinks, KV_HEADS, DIM))
    for row, query, slot in seen_sinks(window, num_sinks, starts):
        gradient, position = rng.standard_normal((KV_HEADS, DIM)), starts[row, query] + slot
        by_chunks[row, query // chunk, slot] += gradient
        (fetched[row, slot] if position < 0 else own[row, position])[...] += gradient
    by_chunks, of_chunks = jnp.asarray(by_chunks), jnp.asarray(starts[:, ::chunk])
    result = add_to_own(jnp.asarray(gradients), by_chunks, of_chunks, chunk)
    np.testing.assert_allclose(result, own, atol=1e-4)
    np.testing.assert_allclose(sum_of_fetched(by_chunks, of_chunks), fetched, atol=1e-4)


@pytest.mark.parametrize("window", [SHORTEST_WINDOW, 64, 126, 127, 128, 1000, 10**6])
def test_a_chunk_is_no_longer_than_a_window(window):
    chunk = chunk_length(window)
    assert 0 < chunk <= window + 1 and chunk % 64 == 0
