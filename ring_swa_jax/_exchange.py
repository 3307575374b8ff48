"""How devices exchange keys: the exchanges' names, their checks, and the default."""

import math

import jax

from ring_swa_jax import _checks
from ring_swa_jax._axis import AxisName, SequenceAxis
from ring_swa_jax._window import Window

EXCHANGES = ("halo", "all_to_all", "ring")


def check_exchange(exchange: str | None) -> None:
    """Checks that ``exchange`` is None or a known name.

    Raises:
        ValueError: an unknown name.
    """
    if exchange is not None and exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r} is none of {EXCHANGES} or None")


def choose_exchange(
    exchange: str | None,
    axis: SequenceAxis,
    *,
    chunk: int,
    heads: int,
    window: Window,
    num_sinks: int,
) -> str:
    """The exchange of a call; on one device "halo", which then fetches nothing.

    None means "halo" for a window shorter than a chunk. For a longer window, and without a window,
    None means "all_to_all" where the number of devices divides the query heads and one process has
    all these devices. Elsewhere None means "halo" with a window and "ring" without one. On four
    H100 (65536 tokens, 32/8 heads of 128, forward and backward) a halo took 0.96 times as long as
    an all-to-all for a window of 8191, half a chunk, 1.11 times for 16383 and 1.35 times for 32767.
    Since then the backward pass of a single hop has become up to 13% faster; that of several hops,
    which windows longer than a chunk take, has not.

    Args:
        exchange: what the user says.
        axis: mesh axis that cuts the sequence.
        chunk: tokens on one device.
        heads: query heads on one device.
        window: as the user gives it.
        num_sinks: first tokens of its sequence that a query always sees.

    Raises:
        ValueError: the named exchange cannot do this.
    """
    check_exchange(exchange)
    size = axis.size
    if size == 1:
        return "halo"
    reaches_all = window.reaches_all(size * chunk)
    if exchange is None:
        exchange = "ring" if reaches_all else "halo"
        long = reaches_all or max(window.left or 0, window.right or 0) >= chunk
        if long and heads % size == 0 and within_one_host(axis.name):
            exchange = "all_to_all"
    if exchange == "halo":
        if None in (window.left, window.right):
            raise ValueError(
                "exchange='halo' needs a window with two bounds, but "
                f"window_size={window.setting} reaches all keys on a side; use "
                "exchange='all_to_all', 'ring' or None"
            )
        _checks.check_sinks_fit(num_sinks, chunk, size)
    if exchange == "all_to_all" and heads % size:
        raise ValueError(
            "exchange='all_to_all' needs a number of devices that divides the heads, got "
            f"{size} devices of {axis.name!r} and {heads} query heads; use None or fewer devices"
        )
    if exchange == "ring" and not reaches_all:
        raise ValueError(
            "exchange='ring' is for windows that lack a bound, but "
            f"window_size={window.setting} ends within the sequence of {size * chunk} tokens on "
            "both sides; use 'halo', 'all_to_all' or None"
        )
    return exchange


def within_one_host(axis: AxisName | None) -> bool:
    """Whether the devices along a mesh axis, or along several, belong to one process.

    Assumes that the mesh's devices are in the order of the processes, as in `jax.make_mesh`. The
    sizes of the axis and of all axes after it, multiplied, must then divide the devices of one
    process.
    """
    if jax.process_count() == 1:
        return True
    shape = jax.sharding.get_abstract_mesh().shape
    names = axis if isinstance(axis, tuple) else (axis,)
    first = min(list(shape).index(name) for name in names)
    return jax.local_device_count() % math.prod(list(shape.values())[first:]) == 0
