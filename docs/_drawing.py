"""What the drawings share: colors, cells, boxes and arrows."""

import pathlib

import matplotlib

matplotlib.use("agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

COLORS = ["#4477aa", "#228833", "#ccbb44", "#aa3377"]
"""Of the devices 0 to 3."""


def cell(
    axes: Axes,
    x: float,
    y: float,
    color: str,
    *,
    width: float = 1.0,
    height: float = 1.0,
    hatch: str | None = None,
) -> None:
    """A filled cell, or with a hatch a white one."""
    face, edge = ("white", color) if hatch else (color, "white")
    axes.add_patch(
        Rectangle((x, y), width, height, facecolor=face, edgecolor=edge, hatch=hatch, linewidth=0.9)
    )


def arrow(
    axes: Axes, begin: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0
) -> None:
    """An arrow, bent to the left of its way by so much."""
    axes.add_patch(
        FancyArrowPatch(
            begin,
            end,
            arrowstyle="-|>",
            mutation_scale=16,
            linewidth=1.8,
            color=color,
            zorder=3,
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def save(figure: Figure, name: str) -> None:
    """Writes docs/NAME.png."""
    figure.savefig(pathlib.Path(__file__).with_name(f"{name}.png"), dpi=130)
