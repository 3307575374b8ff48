"""What the scaling benchmark found: points, tables in Markdown, a picture."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _markdown
from benchmarks._results import Document
from benchmarks._ring_report import ONE_RANK, RING
from benchmarks._timing import median_of, ratio_quartiles


class Program(NamedTuple):
    """Of the ring or of one rank, "forward" or "both", so many layers."""

    name: str
    kind: str
    layers: int


@dataclasses.dataclass(frozen=True)
class Point:
    """Milliseconds of a layer on so many devices; None and a reason if it did not run.

    Names that end in "_forward" are of the forward pass, the others of forward and backward.
    ``window`` is the name of the shape. ``ring`` and ``one_rank`` are of programs of ``layers``
    layers, ``alone`` of the ring in a program of one. The rounds of ``one_rank``, the yardstick of
    weak scaling, over the ring's have the quartiles ``quartiles``.
    """

    kind: str
    window: str
    devices: int
    layers: int
    ring_forward: float | None = None
    ring: float | None = None
    one_rank_forward: float | None = None
    one_rank: float | None = None
    alone_forward: float | None = None
    alone: float | None = None
    quartiles_forward: tuple[float, float, float] | None = None
    quartiles: tuple[float, float, float] | None = None
    reason: str | None = None


def figures(layers: int, times: dict[Program, list[float]]) -> dict[str, Any]:
    """Of a `Point`, from the seconds of the programs' rounds."""
    found: dict[str, Any] = {}
    for kind, end in (("forward", "_forward"), ("both", "")):
        ring, one_rank, alone = (
            [1e3 * x / program.layers for x in times.get(program, [])]
            for program in (
                Program(RING, kind, layers),
                Program(ONE_RANK, kind, layers),
                Program(RING, kind, 1),
            )
        )
        found[f"ring{end}"], found[f"one_rank{end}"] = median_of(ring), median_of(one_rank)
        found[f"alone{end}"] = median_of(alone) if layers > 1 else None
        found[f"quartiles{end}"] = ratio_quartiles(one_rank, ring)
    return found


def efficiencies(point: Point, points: list[Point]) -> dict[str, float | None]:
    """Of weak scaling beside one rank, of strong scaling beside one GPU."""
    if point.kind == "weak":
        forward, both = (
            None if quartiles is None else quartiles[1]
            for quartiles in (point.quartiles_forward, point.quartiles)
        )
        return {"efficiency_forward": forward, "efficiency": both}
    time = next((x.ring for x in points if x.devices == 1 and x.window == point.window), None)
    if time is None or point.ring is None:
        return {"efficiency": None}
    return {"efficiency": time / point.devices / point.ring}


Entry = dict[str, Any]
"""A `Point` as a dictionary, with its efficiencies."""


def tables(document: Document) -> list[str]:
    """For a page: weak scaling, a line for each window and number of GPUs, and strong scaling."""
    kinds = {"weak": _weak, "strong": _strong}
    points = {
        kind: [x for x in document["points"] if x["kind"] == kind and x["ring"] is not None]
        for kind in kinds
    }
    return [table for kind, make in kinds.items() if (table := make(points[kind]))]


def _weak(points: list[Entry]) -> str:
    head = ["window_size", "GPUs", "one GPU, the same work", "the ring", "efficiency"]
    # Earlier files have one program for each layer, and no times of the forward pass.
    alone = any(x.get("alone") is not None for x in points)
    rows = [
        [
            _window(x["window"]),
            str(x["devices"]),
            _pair(x, "one_rank", "{:.3f}"),
            _pair(x, "ring", "{:.3f}"),
            _pair(x, "efficiency", "{:.1%}"),
            *([_pair(x, "alone", "{:.3f}")] if alone else []),
        ]
        for x in sorted(points, key=lambda x: x["devices"])
    ]
    return _markdown.table([*head, "the ring, one layer a program"] if alone else head, rows)


def _strong(points: list[Entry]) -> str:
    counts = sorted({x["devices"] for x in points})
    found = {(x["window"], x["devices"]): x for x in points}

    def cell(window: str, count: int) -> str:
        point = found.get((window, count))
        if point is None:
            return "-"
        over = "" if count == 1 or point["efficiency"] is None else f"; {point['efficiency']:.1%}"
        return f"{point['ring']:.3f}{over}"

    head = ["window_size", *(f"{n} GPU{'s; efficiency' if n > 1 else ''}" for n in counts)]
    windows = dict.fromkeys(x["window"] for x in points)
    return _markdown.table(head, [[_window(x), *(cell(x, n) for n in counts)] for x in windows])


def _window(name: str) -> str:
    return f"({', '.join(name.split('+'))})" if "+" in name else name


def _pair(point: Entry, name: str, form: str) -> str:
    """Forward / forward and backward, as far as they are there."""
    found = [point.get(f"{name}_forward"), point.get(name)]
    return " / ".join(form.format(x) for x in found if x is not None) or "-"


def chart(path: Path) -> None:
    """Efficiency over the number of GPUs, in a picture beside the JSON at ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    document = json.loads(path.read_text())
    where, points = document["machine"], document["points"]
    panels = {
        "as many tokens a GPU, forward": ("weak", "efficiency_forward"),
        "as many tokens a GPU, forward + backward": ("weak", "efficiency"),
        "as many tokens in all, forward + backward": ("strong", "efficiency"),
    }
    found = {
        title: (name, own)
        for title, (kind, name) in panels.items()
        if (own := [x for x in points if x["kind"] == kind and x.get(name)])
    }
    count = max(len(found), 1)
    size = 1.2 + 4 * count, 4
    figure, (axes,) = plt.subplots(
        1, count, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (title, (name, own)) in zip(axes, found.items(), strict=False):
        for window in dict.fromkeys(x["window"] for x in own):
            places = [(x["devices"], x[name]) for x in own if x["window"] == window]
            axis.plot(*zip(*places, strict=True), "o-", label=window)
        axis.axhline(0.95, color="0.7", linewidth=0.8)
        axis.set(title=title, xlabel="GPUs", ylim=(0, 1.1))
        axis.title.set_fontsize("medium")
        axis.set_xticks(sorted({x["devices"] for x in points}))
        axis.legend(fontsize="small", loc="lower left")
    axes[0].set_ylabel("efficiency")
    figure.suptitle(f"{where['device']}, jax {where['jax']}, bfloat16", fontsize="medium")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
