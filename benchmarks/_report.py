"""What a comparison on one GPU found: a table, JSON, a chart, and against an earlier one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks._results import Document
from benchmarks._shapes import Shape
from benchmarks._timing import ratio_quartiles

KINDS = ("forward", "both")
TITLES = {"forward": "forward", "both": "forward + backward"}
TOLERANCE = 1.03
"""Times differ by this much between runs of the same program."""
AGAIN = " again"
"""Behind a name: the same program once more, whose times say how far times differ."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of a contender on a shape; None and a reason where it did not run.

    ``forward`` and ``both`` are the medians of ``rounds``, by kind. torch's has no rounds.
    """

    shape: Shape
    name: str
    ours: bool
    forward: float | None = None
    both: float | None = None
    reason: str | None = None
    rounds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def rates(self) -> dict[str, float]:
        """Milliseconds and useful TFLOP/s of what was timed."""
        found: dict[str, float] = {}
        forward, backward = self.shape.forward_flops() / 1e12, self.shape.backward_flops() / 1e12
        if self.forward is not None:
            found |= {"forward_ms": self.forward * 1e3, "forward_tflops": forward / self.forward}
        if self.both is not None:
            found |= {"both_ms": self.both * 1e3, "both_tflops": (forward + backward) / self.both}
        if self.forward is not None and self.both is not None:
            found["backward_tflops"] = backward / (self.both - self.forward)
        return found

    def entry(self) -> dict[str, Any]:
        """For JSON, the shape by its name."""
        fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        return fields | {"shape": self.shape.name} | self.rates()


def fastest_peer(rows: list[Row], kind: str) -> Row | None:
    """That of one shape with the least time."""
    peers = [row for row in rows if not row.ours and getattr(row, kind) is not None]
    return min(peers, key=lambda row: getattr(row, kind), default=None)


def table(rows: list[Row]) -> str:
    """Lines of one shape; a ratio below 1 is faster than the fastest peer."""
    shape = rows[0].shape
    lines = [
        f"\n{shape.name}: B {shape.batch}, T {shape.length}, heads {shape.heads}/"
        f"{shape.kv_heads}, H {shape.dim}, window {shape.window_size}, sinks {shape.sinks}, "
        f"{len(shape.documents) or 1} sequences{', learned sinks' if shape.learned else ''}",
        f"  {'':28s}{''.join(f'{TITLES[kind]:42s}' for kind in KINDS)}backward",
        f"  {'':28s}{'      ms TFLOP/s  / fastest peer            ' * 2} TFLOP/s",
    ]
    for row in rows:
        rates = row.rates()
        cells = [_cell(row, kind, rates, fastest_peer(rows, kind)) for kind in KINDS]
        backward = f"{rates['backward_tflops']:8.0f}" if "backward_tflops" in rates else ""
        lines.append(f"  {row.name:28s}{''.join(cells)}{backward}  {row.reason or ''}".rstrip())
    return "\n".join(lines)


def _cell(row: Row, kind: str, rates: dict[str, float], peer: Row | None) -> str:
    if f"{kind}_ms" not in rates:
        return f"{'-':>8s}{'':34s}"
    ratio = ""
    if peer is not None and peer is not row:
        ratio = f"{getattr(row, kind) / getattr(peer, kind):.3f}"
        if found := ratio_quartiles(row.rounds.get(kind, []), peer.rounds.get(kind, [])):
            ratio = f"{found[1]:.3f} ({found[0]:.3f}-{found[2]:.3f})"
    return f"{rates[f'{kind}_ms']:8.3f}{rates[f'{kind}_tflops']:8.0f}  {ratio:24s}"


def document(machine: dict[str, Any], rows: list[Row], clocks: dict[str, Any]) -> Document:
    """For JSON. ``clocks`` are those of the GPU after each shape."""
    return {"machine": machine, "clocks": clocks, "rows": [row.entry() for row in rows]}


def read(path: Path, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier JSON.

    Raises:
        ValueError: it is of another device.
    """
    before = json.loads(path.read_text())
    if before["machine"]["device"] != machine["device"]:
        raise ValueError(f"{path} is of {before['machine']['device']}, not {machine['device']}")
    return before["rows"]


def slower(before: list[dict[str, Any]], rows: list[Row]) -> list[str]:
    """What of ours takes longer than in earlier rows, by more than the tolerance, or fails now."""
    now = {(row.shape.name, row.name): row for row in rows if row.ours}
    found = []
    for old in before:
        row = now.get((old["shape"], old["name"]))
        if row is None:
            continue
        for kind in KINDS:
            was, seconds = old[kind], getattr(row, kind)
            title = f"{row.shape.name} {row.name} {TITLES[kind]}"
            if was is not None and seconds is None:
                found.append(f"{title}: {was * 1e3:.3f} ms, now none: {row.reason}")
            elif was is not None and seconds > was * TOLERANCE:
                change = 100 * (seconds / was - 1)
                found.append(f"{title}: {was * 1e3:.3f} -> {seconds * 1e3:.3f} ms (+{change:.0f}%)")
    return found


def chart(path: Path) -> None:
    """Useful TFLOP/s as bars, in a picture beside the JSON at ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = json.loads(path.read_text())
    machine, rows = found["machine"], found["rows"]
    rows = [row for row in rows if not row["name"].endswith(AGAIN)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows if row["forward"] or row["both"]))
    rates = {(row["shape"], row["name"]): row for row in rows}
    width = 0.8 / max(len(names), 1)
    size = max(13, len(shapes)), 8
    figure, axes = plt.subplots(2, 1, figsize=size, sharex=True, layout="constrained")
    for axis, kind in zip(axes, KINDS, strict=True):
        for n, name in enumerate(names):
            heights = [rates.get((s, name), {}).get(f"{kind}_tflops", 0) for s in shapes]
            places = [x + (n - (len(names) - 1) / 2) * width for x in range(len(shapes))]
            axis.bar(places, heights, width, label=name)
        axis.set_ylabel(f"{TITLES[kind]}, useful TFLOP/s")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_title(f"{machine['device']}, jax {machine['jax']}, bfloat16")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    axes[1].set_xticks(range(len(shapes)), [s.replace("-", "\n", 1) for s in shapes], fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
