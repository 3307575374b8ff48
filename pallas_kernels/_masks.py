"""Which keys a query sees: the one place that says it, for all kernels."""

import jax.numpy as jnp


def in_window(i, j, start, window: int | None):
    """Key j is query i's own or one of the ``window`` keys before it, in i's sequence.

    ``start=None`` says that all keys at hand are of i's sequence.
    """
    # As unsigned numbers, one comparison for 0 <= i - j <= window.
    past = j <= i if window is None else (i - j).astype(jnp.uint32) <= jnp.uint32(window)
    return past if start is None else past & (start <= j)


def is_sink(i, j, start, num_sinks: int):
    """Key j is one of the first ``num_sinks`` tokens of query i's sequence, and not after i."""
    return (start <= j) & (j <= i) & (j - start < num_sinks)


def is_real(i, start):
    """Token i, whose sequence starts at ``start``, is no padding."""
    return start <= i


def sees(i, j, start, window: int | None, num_sinks: int, *, packed: bool):
    """Query i attends key j of its shard or halo.

    Unless sequences are ``packed``, a run of keys that a plan visits lies in i's sequence whole:
    a chunk before the sequence's first has no tile in any plan.
    """
    seen = in_window(i, j, start if packed else None, window)
    return seen | is_sink(i, j, start, num_sinks) if num_sinks else seen


def sees_behind_halo(i, j, start, window: int | None, num_sinks: int, *, packed: bool):
    """As `sees`, but a key before the shard is a sink only where it comes as a fetched one."""
    seen = in_window(i, j, start if packed else None, window)
    return seen | (is_sink(i, j, start, num_sinks) & (j >= 0)) if num_sinks else seen


def sees_fetched_sink(i, j, start, window: int | None, num_sinks: int):
    """Query i attends key j fetched as a sink: never a key that the shard or the window holds."""
    return sees_beyond_window(i, j, start, window, num_sinks) & (j < 0)


def sees_beyond_window(i, j, start, window: int | None, num_sinks: int):
    """Query i attends key j as a sink alone, which its window does not reach."""
    beyond_window = False if window is None else i - j > window
    return is_sink(i, j, start, num_sinks) & beyond_window


def sees_sink_before(i, j, start, num_sinks: int, stop):
    """Query i attends key j as a sink that stands before all keys its window may reach."""
    return is_sink(i, j, start, num_sinks) & (j < stop)


def sink_reach(window: int | None, num_sinks: int, chunk: int) -> int:
    """How far behind a sequence's start queries stand whose sinks another launch computes.

    At least ``chunk``, so that a chunk of queries has such queries of one sequence only, and so
    far that no window covers both.
    """
    assert window is not None
    return max(chunk, window + num_sinks)


def sees_near(i, j, start, window: int | None, num_sinks: int, reach: int, *, packed: bool):
    """As `sees`, but without the sinks of queries that stand ``reach`` or more after them."""
    seen = in_window(i, j, start if packed else None, window)
    if num_sinks:
        seen |= is_sink(i, j, start, num_sinks) & (i - start < reach)
    return seen


def sees_far_sink(i, j, start, num_sinks: int, reach: int):
    """What `sees_near` leaves out; ``reach`` is so large that no window covers these."""
    return is_sink(i, j, start, num_sinks) & (i - start >= reach)
