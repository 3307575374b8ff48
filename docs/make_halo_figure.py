"""Draws docs/halo.png: `python docs/make_halo_figure.py`."""

from matplotlib import pyplot
from matplotlib.axes import Axes

from _drawing import COLORS, arrow, cell, save

DEVICES, CHUNK, WINDOW = 4, 8, 5


def draw_key(axes: Axes, key: int, row: float, *, halo: bool, height: float = 1.0) -> None:
    """One key of the sequence, in the color of the device that owns it."""
    cell(axes, key, row, COLORS[key // CHUNK], height=height, hatch="//////" if halo else None)


def draw_band(axes: Axes) -> None:
    """Which keys every query sees."""
    length = DEVICES * CHUNK
    for query in range(length):
        for key in range(max(0, query - WINDOW), query + 1):
            draw_key(axes, key, query, halo=key // CHUNK != query // CHUNK)
    for boundary in range(0, length + 1, CHUNK):
        axes.axhline(boundary, color="0.7", linewidth=0.8, zorder=0)
        axes.axvline(boundary, color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal")
    axes.set_title(f"Every query sees {WINDOW} keys back and its own", fontsize=11)
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    axes.set_xticks(range(0, length + 1, CHUNK))
    axes.set_yticks(range(0, length + 1, CHUNK))
    axes.tick_params(length=0)
    for device in range(DEVICES):
        middle = (device + 0.5) * CHUNK
        axes.text(
            length + 0.7, middle, f"device {device}", color=COLORS[device], va="center", fontsize=10
        )


def draw_exchange(axes: Axes) -> None:
    """Which keys and values travel."""
    step, height = 3.2, 1.4
    for device in range(DEVICES):
        row, start = device * step, device * CHUNK
        for key in range(start, start + CHUNK):
            draw_key(axes, key, row, halo=False, height=height)
        middle = start + CHUNK / 2
        axes.text(middle, row - 0.25, f"device {device}", ha="center", va="bottom", fontsize=10)
        if device == 0:
            continue
        for key in range(start - WINDOW, start):
            draw_key(axes, key, row, halo=True, height=height)
        middle = start - WINDOW / 2
        begin, end = (middle, row - step + height + 0.1), (middle, row - 0.1)
        arrow(axes, begin, end, COLORS[device - 1])
        axes.text(
            start - WINDOW - 0.5,
            row + height / 2,
            "halo",
            ha="right",
            va="center",
            fontsize=10,
            color=COLORS[device - 1],
        )
    bottom = (DEVICES - 1) * step + height
    axes.set(xlim=(-0.5, DEVICES * CHUNK + 0.5), ylim=(bottom + 0.4, -1.6))
    axes.set_title("The last keys and values of a chunk travel",
                   fontsize=11)  # fmt: skip
    axes.axis("off")


def main() -> None:
    """Writes the picture."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.6, 4.2), layout="constrained", width_ratios=[1, 1.25]
    )
    draw_band(left)
    draw_exchange(right)
    save(figure, "halo")


if __name__ == "__main__":
    main()
