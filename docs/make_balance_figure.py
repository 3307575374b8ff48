"""Draws docs/balance.png: `python docs/make_balance_figure.py`.

Half chunks are those that the library deals out.
"""

from collections.abc import Callable

from matplotlib import pyplot
from matplotlib.axes import Axes

from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._half_chunk_pairs import Pairs

from _drawing import COLORS, cell, save

DEVICES = 4
HALVES = 2 * DEVICES


def draw_work(axes: Axes, title: str, owner: Callable[[int, int], int]) -> None:
    """Squares of half a chunk of queries by half a chunk of keys, in the color of their device."""
    work = [0.0] * DEVICES
    for query in range(HALVES):
        for key in range(query + 1):
            device = owner(query, key)
            cell(axes, key, query, COLORS[device])
            work[device] += 0.5 if key == query else 1
        home = query // 2
        axes.text(-0.2, query + 0.5, f"{home}", color=COLORS[home], ha="right", va="center")
    for device, squares in enumerate(work):
        axes.text(
            HALVES + 0.1, 0.6 + 0.75 * device, f"device {device}: {squares:g} squares",
            color=COLORS[device], ha="right", va="center",
        )  # fmt: skip
    axes.set_title(title, fontsize=11)
    axes.set(xlim=(-0.9, HALVES + 0.2), ylim=(HALVES + 0.2, -0.2), aspect="equal")
    axes.axis("off")


def owner_in_ring(query: int, key: int) -> int:
    """The device that attends from a half chunk of queries to one of keys."""
    pairs = Pairs(SequenceAxis("seq", DEVICES), "contiguous", 2)
    if not pairs.sees(query, key):
        return query // 2
    return next(device for device in range(DEVICES) if query in map(int, pairs.numbers(device)))


def draw_exchange(axes: Axes) -> None:
    """Chunks of all heads, and the whole sequence of some."""
    for device in range(DEVICES):
        for other in range(DEVICES):
            cell(axes, other, 1 + device, COLORS[device])
            cell(axes, DEVICES + 1.6 + other, 1 + device, COLORS[other])
    axes.annotate("", (DEVICES + 1.45, 3), (DEVICES + 0.15, 3), arrowprops={"arrowstyle": "->"})
    for begin in (0, DEVICES + 1.6):
        axes.text(begin + DEVICES / 2, 0.75, "heads", ha="center", va="bottom")
    axes.text(-0.2, 3, "tokens", rotation=90, ha="right", va="center")
    axes.set_title('"all_to_all": heads for chunks, and back', fontsize=11)
    axes.set(xlim=(-0.9, 2 * DEVICES + 1.8), ylim=(DEVICES + 2.2, -0.6), aspect="equal")
    axes.axis("off")


def main() -> None:
    """Writes the picture."""
    pyplot.rcParams.update({"font.size": 10.5})
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
    draw_work(axes[0], "contiguous chunks", lambda query, key: query // 2)
    draw_work(axes[1], '"ring": pairs of half chunks beside the own chunk', owner_in_ring)
    draw_exchange(axes[2])
    save(figure, "balance")


if __name__ == "__main__":
    main()
