"""Draws the README's picture from the results: ``python -m benchmarks.plot_summary``.

Training steps of whole models above, then one layer on one H100 beside the peers, and one layer of
a sequence over two. A bar is a time divided by ours; what it stands for is written at its end.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks import _results as results
from benchmarks._model_report import job_of
from benchmarks._model_sizes import MODELS
from benchmarks._report import KINDS, TITLES
from benchmarks._ring_shapes import SHAPES as RING_SHAPES
from benchmarks._shapes import SHAPES, Shape

OUTPUT = Path(__file__).parent.parent / "docs" / "summary.png"
DEVICE = "nvidia-h100-80gb-hbm3"
RING_ROWS = ("sliding-1000", "sliding-4000", "streaming-1000", "mistral", "gptoss")
STEPS = ((4, 65536), (1, 16384))
"""GPUs that share one sequence, and its tokens."""
LONGEST = 3.2
"""Bars end here; their number goes on."""

# A colour is one program in all panels.
OURS, CUDNN, GATHERED, EXCHANGED = "#4477aa", "#ccbb44", "#ee8866", "#997700"
PEERS = {
    "mosaic_gpu": ("this library", OURS),
    "triton": ('this library, implementation="triton"', "#66ccee"),
    "fa3": ("FlashAttention-3", "#228833"),
    "cudnn": ("cuDNN", CUDNN),
    "tokamax": ("tokamax", "#ee6677"),
}
RINGS = {
    "ring": ("this library", OURS),
    "all-gather + ours": ("all-gather, then this library's kernels", "#aa3377"),
    "all-gather + cuDNN": ("all-gather, then cuDNN", GATHERED),
    "all-to-all + cuDNN": ("all-to-all of heads around cuDNN", EXCHANGED),
    "original (copied)": ("PyTorch original (two H200, copied)", "#777777"),
}
TRAINED = {
    "ours": ("this library", OURS),
    "all-gather + cuDNN": ("all-gather, then cuDNN", GATHERED),
    "all-to-all + cuDNN": ("all-to-all of heads around cuDNN", EXCHANGED),
    "cudnn": ("cuDNN", CUDNN),
}

Group = dict[str, tuple[float, str] | None]
"""{bar: (its time, what is written at its end)}; None for what cannot be done."""


@dataclasses.dataclass
class Panel:
    """Two pictures side by side, of the same groups of bars.

    Attributes:
        title: above both.
        bars: name in the results to name in the picture and colour; the first is divided by.
        labels: of the groups.
        columns: title and groups of each picture.
        written: what stands at the bars.
        height: of the panel, relative to the others.
    """

    title: str
    bars: dict[str, tuple[str, str]]
    labels: list[str]
    columns: dict[str, list[Group]]
    written: str = "milliseconds"
    height: float = 1.0


def label(shape: Shape) -> str:
    """Three lines."""
    window = "no window" if shape.window is None else f"window {shape.window}"
    sinks = f", {shape.sinks} sink token" if shape.sinks else ""
    heads = f"{shape.heads}/{shape.kv_heads} heads of {shape.dim}"
    return f"{window}{sinks}\n{shape.length} tokens\n{heads}"


def of_layers(
    title: str, rows: dict[str, list[dict[str, Any]]], shapes: dict[str, Any], bars: dict[str, Any]
) -> Panel:
    """The panel of layers; ``rows`` are those of each shape in a JSON."""

    def cell(row: dict[str, Any], kind: str) -> tuple[float, str] | None:
        time = row.get(f"{kind}_ms")
        return time and (time, f"{time:.2f}" if time < 100 else f"{time:.0f}")

    columns = {
        TITLES[kind]: [
            {row["name"]: cell(row, kind) for row in found if row["name"] in bars}
            for found in rows.values()
        ]
        for kind in KINDS
    }
    return Panel(f"One layer on {title}", bars, [label(shapes[name]) for name in rows], columns)


def one_gpu(document: results.Document) -> Panel:
    """The plain shapes."""
    machine = document["machine"]
    rows = {x: [row for row in document["rows"] if row["shape"] == x] for x in SHAPES}
    ran = {row["name"] for found in rows.values() for row in found if row["forward"]}
    bars = {name: style for name, style in PEERS.items() if name in ran}
    return of_layers(f"one {said(machine)}", rows, SHAPES, bars)


def two_gpus(document: results.Document) -> Panel:
    """Some shapes."""
    machine = document["machine"]
    found = {entry["shape"]["name"]: entry["rows"] for entry in document["shapes"]}
    rows = {name: found[name] for name in RING_ROWS}
    title = f"{machine['devices']} {said(machine, ' that share a sequence')}"
    return of_layers(title, rows, RING_SHAPES, RINGS)


def models(document: results.Document) -> Panel:
    """Training steps of whole models."""
    columns = {}
    for devices, length in STEPS:
        groups = []
        for model in MODELS:
            group: Group = {}
            for row in document["rows"]:
                job = job_of(row)
                same = (job.model, job.data, job.seq, job.batch, job.length)
                if same == (model, 1, devices, 1, length) and "tokens_per_second" in row:
                    name = "cudnn" if devices == 1 and job.contender != "ours" else job.contender
                    group[name] = row["seconds"], f"{row['tokens_per_second']:,.0f}"
            groups.append(group)
        title = f"one sequence of {length} tokens on {devices} GPU{'s' if devices > 1 else ''}"
        columns[title] = groups
    title = f"Training steps of whole models on {said(document['machine'])}"
    return Panel(title, TRAINED, list(MODELS), columns, "tokens a second", 0.72)


def said(machine: dict[str, Any], more: str = "") -> str:
    """The device and how it was measured."""
    return f"{machine['device']}{more}\njax {machine['jax']}, bfloat16, {machine['date']}"


def draw(axes: Axes, panel: Panel, title: str, groups: list[Group]) -> None:
    """One picture. A bar that no group of it has takes no room."""
    bars = [name for name in panel.bars if any(name in group for group in groups)]
    height = 0.84 / len(bars)
    for n, name in enumerate(bars):
        color = panel.bars[name][1]
        for place, group in enumerate(groups):
            y = place + (n - (len(bars) - 1) / 2) * height
            cell, base = group.get(name), group.get(bars[0])
            if cell is None or base is None:
                missing = "cannot" if name in group else "not run"
                axes.text(0.03, y, missing, va="center", fontsize=6, color=color)
                continue
            over = cell[0] / base[0]
            axes.barh(y, min(over, LONGEST), height * 0.9, color=color)
            far = f"  ({over:.0f}x)" if over > LONGEST else ""
            axes.text(min(over, LONGEST) + 0.03, y, cell[1] + far, va="center", fontsize=6.5)
    axes.axvline(1, color="0.75", linewidth=0.7, zorder=0)
    axes.set(xlim=(0, LONGEST * 1.28), ylim=(len(groups) - 0.5, -0.5))
    axes.set_xticks([0, 1, 2, 3])
    axes.tick_params(labelsize=7, length=0)
    axes.set_title(title, fontsize=8)
    axes.set_xlabel(f"time / time of this library (at the bars: {panel.written})", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    panels = [
        draw_from(results.read(results.RESULTS / f"{name}-{DEVICE}.json"))
        for name, draw_from in (
            ("model-4x", models),
            ("attention", one_gpu),
            ("ring-2x", two_gpus),
        )
    ]
    figure = plt.figure(figsize=(8, 11.4), layout="constrained")
    heights = [panel.height for panel in panels]
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)
    for part, panel in zip(parts[:, 0], panels, strict=True):
        both = part.subplots(1, 2, sharey=True)
        for axes, (title, groups) in zip(both, panel.columns.items(), strict=True):
            draw(axes, panel, title, groups)
        both[0].set_yticks(range(len(panel.labels)), panel.labels, fontsize=7)
        title, _, settings = panel.title.partition("\n")
        part.suptitle(f"{title}: shorter is faster\n{settings}", fontsize=9)
        handles = [
            mpl.patches.Patch(color=color, label=name) for name, color in panel.bars.values()
        ]
        part.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(arguments.output, dpi=150)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
