"""Draws the README's picture from the results: ``python -m benchmarks.plot_summary``.

One H100 beside the peers above, a sequence over two below; forward left, forward and backward
right. A bar is a time divided by ours; the milliseconds stand at its end.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks._ring_shapes import SHAPES as RING_SHAPES
from benchmarks._shapes import SHAPES, Shape

RESULTS = Path(__file__).parent / "results"
OUTPUT = Path(__file__).parent.parent / "docs" / "summary.png"
ATTENTION, RING = "attention-nvidia-h100-80gb-hbm3", "ring-2x-nvidia-h100-80gb-hbm3"
RING_ROWS = ("sliding-1000", "sliding-4000", "streaming-1000", "mistral", "gptoss")
KINDS = {"forward_ms": "forward", "both_ms": "forward + backward"}
LONGEST = 3.2
"""Bars end here; their number goes on."""

Times = dict[str, dict[str, dict[str, float | None]]]
"""{shape: {bar: {kind: milliseconds}}}."""

# A colour is one program in both halves.
OURS = "#4477aa"
PEERS = {
    "mosaic_gpu": ("this library", OURS),
    "triton": ('this library, implementation="triton"', "#66ccee"),
    "fa3": ("FlashAttention-3", "#228833"),
    "cudnn": ("cuDNN", "#ccbb44"),
    "tokamax": ("tokamax", "#ee6677"),
}
RINGS = {
    "ring": ("this library", OURS),
    "all-gather + ours": ("all-gather, then this library's kernels", "#aa3377"),
    "all-gather + cuDNN": ("all-gather, then cuDNN", "#ee8866"),
    "all-to-all + cuDNN": ("all-to-all of heads around cuDNN", "#997700"),
    "original (copied)": ("PyTorch original (two H200, copied)", "#777777"),
}


def one_gpu() -> tuple[dict[str, Any], Times]:
    """The machine and the times of the plain shapes."""
    document = json.loads((RESULTS / f"{ATTENTION}.json").read_text())
    times: Times = {shape: {} for shape in SHAPES}
    for row in document["rows"]:
        if row["shape"] in times:
            times[row["shape"]][row["name"]] = {kind: row.get(kind) for kind in KINDS}
    return document["machine"], times


def two_gpus() -> tuple[dict[str, Any], Times]:
    """The machine and the times of some shapes."""
    document = json.loads((RESULTS / f"{RING}.json").read_text())
    times = {
        entry["shape"]["name"]: {
            row["name"]: {kind: row[kind] for kind in KINDS} for row in entry["rows"]
        }
        for entry in document["shapes"]
    }
    return document["machine"], {shape: times[shape] for shape in RING_ROWS}


def label(shape: Shape) -> str:
    """Three lines."""
    window = "no window" if shape.window is None else f"window {shape.window}"
    sinks = f", {shape.sinks} sink token" if shape.sinks else ""
    heads = f"{shape.heads}/{shape.kv_heads} heads of {shape.dim}"
    return f"{window}{sinks}\n{shape.length} tokens\n{heads}"


def draw(
    axes: Axes, times: Times, bars: dict[str, tuple[str, str]], base: str, kind: str
) -> list[Any]:
    """Bars of one kind of program, a group a shape."""
    height = 0.84 / len(bars)
    handles = []
    for n, (name, (title, color)) in enumerate(bars.items()):
        offset = (n - (len(bars) - 1) / 2) * height
        for place, rows in enumerate(times.values()):
            time, ours = rows.get(name, {}).get(kind), rows[base][kind]
            y = place + offset
            if time is None or ours is None:
                axes.text(
                    0.03,
                    y,
                    "cannot" if name in rows else "not run",
                    va="center",
                    fontsize=6,
                    color=color,
                )
                continue
            over = time / ours
            axes.barh(y, min(over, LONGEST), height * 0.9, color=color)
            shown = f"{time:.2f}" if time < 100 else f"{time:.0f}"
            far = f"  ({over:.0f}x)" if over > LONGEST else ""
            axes.text(min(over, LONGEST) + 0.03, y, shown + far, va="center", fontsize=6.5)
        handles.append(axes.barh([0], [0], color=color, label=title))
    axes.axvline(1, color="0.75", linewidth=0.7, zorder=0)
    axes.set(xlim=(0, LONGEST * 1.28), ylim=(len(times) - 0.5, -0.5))
    axes.set_xticks([0, 1, 2, 3])
    axes.tick_params(labelsize=7, length=0)
    axes.set_title(KINDS[kind], fontsize=8)
    axes.set_xlabel("time / time of this library (at the bars: milliseconds)", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--date", required=True, help="the day of the measurements, as 2026-11-23")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    alone, alone_times = one_gpu()
    ring, ring_times = two_gpus()
    ran = {name for rows in alone_times.values() for name, row in rows.items() if any(row.values())}
    peers = {name: style for name, style in PEERS.items() if name in ran}
    figure = plt.figure(figsize=(8, 8.4), layout="constrained")
    halves = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for panel, machine, times, bars, base, title, shapes in (
        (halves[0], alone, alone_times, peers, "mosaic_gpu", f"one {alone['device']}", SHAPES),
        (halves[1], ring, ring_times, RINGS, "ring",
         f"{ring['devices']} {ring['device']} that share a sequence", RING_SHAPES),
    ):  # fmt: skip
        left, right = panel.subplots(1, 2, sharey=True)
        for axes, kind in zip((left, right), KINDS, strict=True):
            handles = draw(axes, times, bars, base, kind)
        left.set_yticks(range(len(times)), [label(shapes[name]) for name in times], fontsize=7)
        panel.suptitle(
            f"One layer on {title}: shorter is faster\n"
            f"jax {machine['jax']}, bfloat16, {arguments.date}",
            fontsize=9,
        )
        panel.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(arguments.output, dpi=200)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
