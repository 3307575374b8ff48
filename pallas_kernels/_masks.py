"""Which keys a query sees: the one place that says it, for all kernels.

Positions count from the first query of the shard, so keys before the shard have negative
positions. Where queries see keys after themselves, all keys are moved to smaller positions, so that
every window ends at the query's own position (`Spec`). ``start`` is the position of the first key
of a query's own sequence, ``end`` that behind its last key. ``end`` is None if no key up to a
query's own position lies behind its sequence, as is always so where keys are not moved. A padding
query sees nothing: it has ``start > i``, or with ends ``start == end``.

`sees` is the whole rule: a key in the window (`in_window`) or a sink (`is_sink`). Where a kernel
takes some sinks apart from the other keys, two rules share the pairs out, so that none counts
twice:

- `sees_without_fetched_sinks` and `sees_fetched_sink`: in launches with a halo, sinks before the
  shard come by themselves.
- `sees`, of keys from ``stop`` on, and `sees_sink_before`: in forward kernels of GPUs, whose tiles
  of windows begin at ``stop``.
- `in_window` and `sees_beyond_window`: in backward kernels of Mosaic GPU.
- `sees_except_distant_sinks` and `sees_distant_sink`: in backward kernels of Triton.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int, UInt32

Positions = Int[Array, "*#pairs"]
"""Of queries, of keys or of the starts of queries' sequences; they broadcast against each other."""
Pairs = Bool[Array, "*#pairs"]
"""Whether a mask holds for a query and a key."""


def in_window(i: Positions, j: Positions, start: Positions | None, window: int | None) -> Pairs:
    """Key j is query i's own or one of the ``window`` keys before it, in i's sequence.

    ``start=None``: all keys that are passed belong to i's sequence.
    """
    # As unsigned numbers, one comparison for 0 <= i - j <= window.
    past = j <= i if window is None else (i - j).astype(jnp.uint32) <= jnp.uint32(window)
    return past if start is None else past & (start <= j)


def is_sink(i: Positions, j: Positions, start: Positions, num_sinks: int) -> Pairs:
    """Key j is one of the first ``num_sinks`` tokens of query i's sequence, and not after i.

    Where keys are moved, some sinks after the query count too: their positions are not after i, and
    the window holds them anyway.
    """
    return (start <= j) & (j <= i) & (j - start < num_sinks)


def sees_all_keys(
    window: int | None, *, first_query: int, keys_end: int, one_sequence: bool
) -> bool:
    """Whether all queries see all keys of a run, so that no tile of a launch needs a mask.

    Args:
        window: keys before a query that it sees, or None.
        first_query: position of the first query.
        keys_end: position behind the last key.
        one_sequence: whether all tokens are of one sequence, and no key is behind its end.
    """
    return window is None and one_sequence and keys_end <= first_query + 1


def key_ranges(
    i: Positions,
    start: Positions,
    window: int | None,
    num_sinks: int,
    *,
    end: Positions | None = None,
    first_key: int | None = None,
) -> list[tuple[Positions, Positions]]:
    """The keys that packed query i attends by `sees`, as ranges: (first, behind the last).

    One range for the window, and one for the sinks if there are any. With ``first_key``, which is
    the position of the shard's first key, by `sees_without_fetched_sinks`. Ranges may be empty.
    """
    stop = i + 1 if end is None else jnp.minimum(i + 1, end)
    ranges = [(start if window is None else jnp.maximum(start, i - window), stop)]
    if num_sinks:
        first = start if first_key is None else jnp.maximum(start, first_key)
        ranges.append((first, jnp.minimum(stop, start + num_sinks)))
    return ranges


def range_length(first: Positions, stop: Positions) -> UInt32[Array, "*#pairs"]:
    """How many positions a range has."""
    return jnp.maximum(stop - first, 0).astype(jnp.uint32)


def in_range(j: Positions, first: Positions, length: UInt32[Array, "*#pairs"]) -> Pairs:
    """Key j is in a range, which takes one comparison."""
    return (j - first).astype(jnp.uint32) < length


def is_real(i: Positions, start: Positions, end: Positions | None = None) -> Pairs:
    """Token i, whose sequence starts at ``start``, is no padding."""
    return start <= i if end is None else start < end


def up_to_end(seen: Pairs, j: Positions, end: Positions | None) -> Pairs:
    """The pairs of ``seen`` whose key j is not behind the query's sequence."""
    return seen if end is None else seen & (j < end)


def sees(
    i: Positions,
    j: Positions,
    start: Positions | None,
    window: int | None,
    num_sinks: int,
    *,
    packed: bool,
    end: Positions | None = None,
) -> Pairs:
    """Query i attends key j of its shard or halo.

    Unless sequences are ``packed``, a run of keys is in i's sequence as a whole or not at all, and
    then it has no tile in any plan. So only sinks ask for ``start``.
    """
    seen = in_window(i, j, start if packed else None, window)
    if num_sinks:
        assert start is not None
        seen |= is_sink(i, j, start, num_sinks)
    return up_to_end(seen, j, end)


def sees_without_fetched_sinks(
    i: Positions,
    j: Positions,
    start: Positions,
    window: int | None,
    num_sinks: int,
    *,
    packed: bool,
    first_key: int = 0,
    end: Positions | None = None,
) -> Pairs:
    """As `sees`, without sinks before the shard, which only `sees_fetched_sink` counts.

    ``first_key`` is the position of the shard's first key.
    """
    seen = in_window(i, j, start if packed else None, window)
    if num_sinks:
        seen |= is_sink(i, j, start, num_sinks) & (j >= first_key)
    return up_to_end(seen, j, end)


def sees_fetched_sink(
    i: Positions,
    j: Positions,
    start: Positions,
    window: int | None,
    num_sinks: int,
    *,
    first_key: int = 0,
) -> Pairs:
    """Query i attends key j as a fetched sink: one before the shard and before i's window.

    ``first_key`` is the position of the shard's first key.
    """
    return sees_beyond_window(i, j, start, window, num_sinks) & (j < first_key)


def sees_beyond_window(
    i: Positions, j: Positions, start: Positions, window: int | None, num_sinks: int
) -> Pairs:
    """Query i attends key j as a sink that lies before i's window."""
    beyond_window = False if window is None else i - j > window
    return is_sink(i, j, start, num_sinks) & beyond_window


def sees_sink_before(
    i: Positions, j: Positions, start: Positions, num_sinks: int, stop: Int[Array, ""] | int
) -> Pairs:
    """Query i attends key j as a sink before key ``stop``, where the window's tiles begin."""
    return is_sink(i, j, start, num_sinks) & (j < stop)


def min_sink_distance(window: int | None, num_sinks: int, chunk: int, lookahead: int = 0) -> int:
    """The distance to its sequence's start from which on a query is *distant* from its sinks.

    The sinks of distant queries take a launch of their own. Distant queries are at least ``chunk``
    tokens after their sequence's first one, so that those of a chunk are of one sequence; and so
    far that no distant query has a sink in its window. As keys are moved to the front by
    ``lookahead`` positions, the distance to a sequence's start is that much longer.
    """
    assert window is not None
    return max(chunk + lookahead, window + num_sinks)


def sees_except_distant_sinks(
    i: Positions,
    j: Positions,
    start: Positions,
    window: int | None,
    num_sinks: int,
    min_distance: int,
    *,
    packed: bool,
    end: Positions | None = None,
) -> Pairs:
    """As `sees`, but a distant query sees its window alone.

    A query is distant if it is ``min_distance`` or more after its sequence's start.
    """
    seen = in_window(i, j, start if packed else None, window)
    if num_sinks:
        seen |= is_sink(i, j, start, num_sinks) & (i - start < min_distance)
    return up_to_end(seen, j, end)


def sees_distant_sink(
    i: Positions, j: Positions, start: Positions, num_sinks: int, min_distance: int
) -> Pairs:
    """What `sees_except_distant_sinks` leaves out: the sinks that distant queries attend."""
    return is_sink(i, j, start, num_sinks) & (i - start >= min_distance)
