"""Draws the README's picture from the results: ``python -m benchmarks.plot_summary``.

One H100 beside the peers above, a sequence over two H200 below; forward left, forward and
backward right. A bar is a time over that of our "triton"; the milliseconds stand at its end.
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
ATTENTION = "attention-nvidia-h100-80gb-hbm3-mosaic-gpu"
LATER = "parts/attention-nvidia-h100-80gb-hbm3-wide-and-sinks"
"""A run of some of the shapes, with kernels that came after the other one."""
RING, RING_MOSAIC = "ring-2x-nvidia-h200", "ring-2x-nvidia-h200-mosaic-gpu"
KINDS = {"forward_ms": "forward", "both_ms": "forward + backward"}
LONGEST = 3.2
"""Bars end here; their number goes on."""

Times = dict[str, dict[str, dict[str, float | None]]]
"""{shape: {bar: {kind: milliseconds}}}."""

PEERS = {
    "triton": ("ours, triton", "#4477aa"),
    "mosaic_gpu": ("ours, mosaic_gpu", "#66ccee"),
    "fa3": ("FlashAttention-3", "#228833"),
    "cudnn": ("cuDNN", "#ccbb44"),
    "tokamax": ("tokamax", "#ee6677"),
}
RINGS = {
    "ring": ("our ring, triton", "#4477aa"),
    "ring, mosaic_gpu": ("our ring, mosaic_gpu (another run)", "#66ccee"),
    "all-gather + cuDNN": ("all-gather + cuDNN", "#ccbb44"),
    "all-to-all + cuDNN": ("all-to-all + cuDNN", "#ee8866"),
    "original (copied)": ("PyTorch original (figures copied)", "#777777"),
}


def one_gpu() -> tuple[dict[str, Any], Times]:
    """The machine and the times of the plain shapes; of some of them those of the later run."""
    times: Times = {shape: {} for shape in SHAPES}
    for name in (ATTENTION, LATER):
        document = json.loads((RESULTS / f"{name}.json").read_text())
        times |= {row["shape"]: {} for row in document["rows"] if row["shape"] in times}
        for row in document["rows"]:
            if row["shape"] in times:
                found = {kind: row.get(kind) for kind in KINDS}
                times[row["shape"]][row["name"]] = found
    return document["machine"], times


def two_gpus() -> tuple[dict[str, Any], Times]:
    """The machine and the times of the shapes that both runs of the ring have."""
    machine, times = _ring_times(RING)
    _, mosaic = _ring_times(RING_MOSAIC)
    for shape, rows in mosaic.items():
        times[shape]["ring, mosaic_gpu"] = rows["ring"]
    return machine, {shape: times[shape] for shape in times if shape in mosaic}


def _ring_times(name: str) -> tuple[dict[str, Any], Times]:
    document = json.loads((RESULTS / f"{name}.json").read_text())
    return document["machine"], {
        entry["shape"]["name"]: {
            row["name"]: {kind: row[kind] for kind in KINDS} for row in entry["rows"]
        }
        for entry in document["shapes"]
    }


def label(shape: Shape) -> str:
    """Three lines."""
    window = "W None" if shape.window is None else f"W {shape.window}"
    sinks = f", {shape.sinks} sink" if shape.sinks else ""
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
    axes.set_title(f"{KINDS[kind]}, ms", fontsize=8)
    axes.set_xlabel("time over that of ours with triton", fontsize=7)
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
        (halves[0], alone, alone_times, peers, "triton", f"one {alone['device']}", SHAPES),
        (halves[1], ring, ring_times, RINGS, "ring",
         f"one sequence over {ring['devices']} {ring['device']}", RING_SHAPES),
    ):  # fmt: skip
        left, right = panel.subplots(1, 2, sharey=True)
        for axes, kind in zip((left, right), KINDS, strict=True):
            handles = draw(axes, times, bars, base, kind)
        left.set_yticks(range(len(times)), [label(shapes[name]) for name in times], fontsize=7)
        panel.suptitle(
            f"{title}, jax {machine['jax']}, bfloat16, {arguments.date}", fontsize=9, weight="bold"
        )
        panel.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(arguments.output, dpi=200)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
