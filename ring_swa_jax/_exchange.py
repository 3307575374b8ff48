"""How devices exchange keys: the exchanges' names, their checks, and the default."""

import math

import jax

from ring_swa_jax import _checks
from ring_swa_jax._axis import AxisName, SequenceAxis
from ring_swa_jax._window import Window

EXCHANGES = ("halo", "all_to_all", "ring")

COST_OF_HEADS = 1024
"""Keys a query that take as much time as what an exchange of heads takes beyond a halo's one hop.

From "all_to_all" over "halo" on two and four H100 with NVLink (65536 tokens, 32/8 heads of 128,
windows of 8191, 12287 and 16383; benchmarks/results/full-causal-*.json, 2026-11-27): 500 to 900
forward and backward, 750 to 2100 forward alone. Other heads change both sides alike: bytes and a
key's work grow with their number and size.
"""


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

    None means "all_to_all" without a window and for windows that `prefers_all_to_all` calls long
    enough, where the number of devices divides the query heads and one process has all these
    devices. Elsewhere None means "halo" with a window and "ring" without one.

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
        long = reaches_all or prefers_all_to_all(window, size, chunk)
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


def prefers_all_to_all(window: Window, size: int, chunk: int) -> bool:
    """Whether an exchange of heads should take less time than the halo of a window with two bounds.

    The sequence's first queries lack ``L**2 / 2`` keys of their windows, and its last ones
    ``R**2 / 2``. So the first and the last device have less work than those between them. An
    exchange of heads gives every device the mean: ``(L**2 + R**2) / (2 * S)`` keys a query less
    than the busiest device has. Of two devices each lacks keys, and the busier one has
    ``abs(L**2 - R**2) / (2 * S)`` more than the mean. Beyond a chunk a halo takes several hops, so
    windows of a chunk or more always pass.
    """
    left, right = window.left or 0, window.right or 0
    if max(left, right) >= chunk:
        return True
    missing = abs(left**2 - right**2) if size == 2 else left**2 + right**2
    return missing > 2 * COST_OF_HEADS * size * chunk


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
