"""Draws docs/hops.png, schedule.png and sinks.png: `python docs/make_exchange_figures.py`.

Lengths of hops are those that the library exchanges.
"""

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._halo import RingHalo

from _drawing import COLORS, arrow, cell, save

DEVICES, CHUNK, LONG_WINDOW = 4, 8, 19
DOCUMENTS, SINKS = [11, 16, 5], 2
COMPUTING, TRAVELLING = "#a9c4de", "#f6c3ab"


def draw_hops(axes: Axes) -> None:
    """What the last device receives for a window longer than a chunk."""
    hops = RingHalo.of_window(SequenceAxis("seq", DEVICES), CHUNK, LONG_WINDOW).lengths
    last = DEVICES - 1
    for device in range(DEVICES):
        for key in range(device * CHUNK, (device + 1) * CHUNK):
            cell(axes, key, 0, COLORS[device], height=1.6)
        axes.text((device + 0.5) * CHUNK, -0.3, f"device {device}", ha="center", va="bottom")
    for key in range(last * CHUNK, DEVICES * CHUNK):
        cell(axes, key, 5, COLORS[last], height=1.6)
    for hop, length in enumerate(hops):
        owner = last - 1 - hop
        end = (owner + 1) * CHUNK
        for key in range(end - length, end):
            cell(axes, key, 5, COLORS[owner], height=1.6, hatch="//////")
        middle = end - length / 2
        arrow(axes, (middle, 1.8), (middle, 4.8), COLORS[owner])
        label = f"hop {hop + 1}:\n{length} keys"
        axes.text(middle + 0.4, 3.2, label, color=COLORS[owner], va="center")
    axes.text((last + 0.5) * CHUNK, 7.3, "device 3's own keys", ha="center", va="top")
    begin, end = last * CHUNK - sum(hops), last * CHUNK
    axes.text((begin + end) / 2, 7.3, f"its halo: {sum(hops)} keys", ha="center", va="top")
    axes.set(xlim=(-0.2, DEVICES * CHUNK + 0.2), ylim=(8.3, -1.6))
    axes.axis("off")


def lane(axes: Axes, y: float, boxes: list[tuple[float, float, str, str]]) -> None:
    """Boxes of begin, end, color and label."""
    for begin, end, color, label in boxes:
        cell(axes, begin, y, color, width=end - begin, height=0.9)
        axes.text((begin + end) / 2, y + 0.45, label, ha="center", va="center", fontsize=10.5)


def draw_schedule(axes: Axes, title: str, launches: list, travels: list) -> None:
    """Two lanes over time: what the device computes, and what travels meanwhile."""
    lane(axes, 0, [(begin, end, COMPUTING, label) for begin, end, label in launches])
    lane(axes, 1.05, [(begin, end, TRAVELLING, label) for begin, end, label in travels])
    axes.text(-0.15, 0.45, "computes", ha="right", va="center")
    axes.text(-0.15, 1.5, "travels", ha="right", va="center")
    axes.set_title(title, loc="left", fontsize=11.5)
    axes.set(xlim=(-1.35, 12.1), ylim=(2.05, -0.1))
    axes.axis("off")


def draw_schedules() -> None:
    """Forward and backward, for one hop (backward in two ways) and for three."""
    layout = ConstrainedLayoutEngine(hspace=0.12)
    figure, axes = pyplot.subplots(5, 1, figsize=(9, 8.2), layout=layout)
    draw_schedule(
        axes[0],
        "Forward, a window of at most half a chunk",
        [(0, 8.4, "the rows that see own keys only"), (8.4, 12, "the first W rows, all keys")],
        [(0, 3.2, "keys and values")],
    )
    draw_schedule(
        axes[1],
        "Backward, a window of at most a chunk: the fused kernel for Hopper",
        [(0, 10.4, "halo and own keys: dq, dk, dv"), (11.4, 12, "+")],
        [(10.4, 11.4, "home")],
    )
    draw_schedule(
        axes[2],
        "Backward, a window of at most a chunk: other kernels",
        [(0, 3.6, "halo: dk, dv, some dq"), (3.6, 11.4, "own keys: dq, dk, dv"), (11.4, 12, "+")],
        [(3.6, 6.8, "dk and dv go home")],
    )
    draw_schedule(
        axes[3],
        "Forward, a longer window, here of three hops",
        [(0, 4.2, "all rows, own keys"), (4.2, 7.2, "keys of hop 1"), (7.2, 10.2, "of hop 2"),
         (10.2, 12, "of hop 3")],
        [(0, 1.9, "hop 1"), (1.9, 3.8, "hop 2"), (7.2, 9.1, "hop 3")],
    )  # fmt: skip
    draw_schedule(
        axes[4],
        "Backward, three hops",
        [(1.2, 2.7, "hop 3"), (2.7, 5.2, "hop 2"), (5.2, 7.7, "hop 1"), (7.7, 11.4, "own keys"),
         (11.4, 12, "+")],
        [(0, 1.2, "k, v 3"), (1.2, 2.6, "k, v 2"), (2.7, 3.9, "home 3"), (3.9, 5.1, "k, v 1"),
         (5.2, 6.9, "home 2"), (7.7, 9.4, "home 1")],
    )  # fmt: skip
    save(figure, "schedule")


def draw_sinks(axes: Axes) -> None:
    """Which documents' sinks every device needs, and which of those travel."""
    starts = [sum(DOCUMENTS[:n]) for n in range(len(DOCUMENTS))]
    for key in range(DEVICES * CHUNK):
        cell(axes, key, 0, COLORS[key // CHUNK], height=1.6)
    for number, (start, tokens) in enumerate(zip(starts, DOCUMENTS, strict=True)):
        axes.plot([start + 0.1, start + tokens - 0.1], [-0.7, -0.7], color="black", linewidth=1.4)
        axes.text(start + tokens / 2, -0.9, f"document {number + 1}", ha="center", va="bottom")
        for sink in range(start, start + SINKS):
            axes.plot(sink + 0.5, 0.8, "o", color="black", markersize=5)
    for device in range(1, DEVICES):
        begin = device * CHUNK
        start = max(s for s in starts if s <= begin)
        for slot in range(SINKS):
            x = begin + 1 + slot
            color = COLORS[(start + slot) // CHUNK]
            cell(axes, x, 4.6, color, height=1.6, hatch="//////")
            axes.plot(x + 0.5, 5.4, "o", color="black", markersize=5)
        owner = COLORS[start // CHUNK]
        arrow(axes, (start + SINKS / 2, 1.7), (begin + 1 + SINKS / 2, 4.5), owner)
    for device in range(DEVICES):
        middle = (device + 0.5) * CHUNK
        axes.text(middle, 6.6, f"device {device}", color=COLORS[device], ha="center", va="top")
    axes.text(4, 5.4, "needs nothing", ha="center", va="center", color="0.4")
    for boundary in range(CHUNK, DEVICES * CHUNK, CHUNK):
        axes.axvline(boundary, color="0.7", linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xlim=(-0.2, DEVICES * CHUNK + 0.2), ylim=(7.5, -2))
    axes.axis("off")


def main() -> None:
    """Writes the three pictures."""
    pyplot.rcParams.update({"font.size": 11})
    figure, axes = pyplot.subplots(figsize=(9, 3), layout="constrained")
    draw_hops(axes)
    save(figure, "hops")
    draw_schedules()
    figure, axes = pyplot.subplots(figsize=(9, 3), layout="constrained")
    draw_sinks(axes)
    save(figure, "sinks")


if __name__ == "__main__":
    main()
