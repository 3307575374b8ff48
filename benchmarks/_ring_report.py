"""What the ring's benchmark found: as a table a shape, as JSON, as a chart."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks._report import KINDS, TITLES
from benchmarks._results import Document
from benchmarks._ring_memory import Memory
from benchmarks._ring_shapes import ORIGINAL, RingShape
from benchmarks._timing import ratio_quartiles

RING, ONE_RANK = "ring", "one rank"


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of a contender on a shape; None and a reason where it did not run.

    ``memory`` holds pairs of what the compiler says and the formula's, by kind of program;
    ``rounds`` the times whose medians these are.
    """

    shape: str
    name: str
    forward: float | None = None
    both: float | None = None
    reason: str | None = None
    memory: dict[str, tuple[Memory, Memory | None]] = dataclasses.field(default_factory=dict)
    rounds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def milliseconds(self, kind: str) -> float | None:
        """Of the kind "forward" or "both"."""
        seconds = getattr(self, kind)
        return None if seconds is None else seconds * 1e3


def original(shape: RingShape, devices: int) -> Row | None:
    """The original's figures as a row, where they are of as many devices."""
    if shape.original is None or devices != 2:
        return None
    forward, both = (milliseconds / 1e3 for milliseconds in shape.original)
    return Row(shape.name, "original (copied)", forward, both)


def ratios(rows: list[Row]) -> dict[str, dict[str, float]]:
    """{name: {kind: its time over the ring's}}; for "one rank" that is the ring's efficiency."""
    (ring,) = (row for row in rows if row.name == RING)
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for kind in KINDS:
            time, base = getattr(row, kind), getattr(ring, kind)
            if row is not ring and time is not None and base is not None:
                by_round = ratio_quartiles(row.rounds.get(kind, []), ring.rounds.get(kind, []))
                found.setdefault(row.name, {})[kind] = by_round[1] if by_round else time / base
    return found


def table(shape: RingShape, devices: int, rows: list[Row]) -> str:
    """Lines of one shape."""
    lines = [
        f"\n{shape.name}: B {shape.batch}, S {shape.length} over {devices}, heads "
        f"{shape.heads}/{shape.kv_heads}, H {shape.dim}, window {shape.window_size}, sinks "
        f"{shape.sinks}, {len(shape.documents) or 1} sequences, busiest rank "
        f"{shape.busiest(devices)}",
        f"  {'':20s} {'forward':>17s} {'forward+backward':>19s}",
        f"  {'':20s} {'ms':>9s} {'/ ring':>7s}   {'ms':>9s} {'/ ring':>7s}",
    ]
    over = ratios(rows)
    for row in rows:
        cells = []
        for kind in KINDS:
            time, ratio = row.milliseconds(kind), over.get(row.name, {}).get(kind)
            shown = f"{'-':>9s}" if time is None else f"{time:9.3f}"
            cells.append(shown + (f" {'':>7s}" if ratio is None else f" {ratio:7.3f}"))
        note = f"  {row.reason}" if row.reason else ""
        lines.append(f"  {row.name:20s} {'   '.join(cells)}{note}")
        for kind, (got, formula) in row.memory.items():
            expected = "none for several hops" if formula is None else f"{_mib(formula)} by formula"
            lines.append(f"  {'':20s} memory of {kind}: {_mib(got)}, {expected}")
    return "\n".join(lines)


def _mib(memory: Memory) -> str:
    return f"{memory.peak / 2**20:.1f} MiB ({memory.temporary / 2**20:.1f} temporary)"


def entry(shape: RingShape, devices: int, rows: list[Row]) -> dict[str, Any]:
    """A shape's part of the JSON. Ratios are times over the ring's."""
    over = ratios(rows)
    return {
        "shape": dataclasses.asdict(shape),
        "busiest_rank": shape.busiest(devices),
        "rows": [
            dataclasses.asdict(row)
            | {f"{kind}_ms": row.milliseconds(kind) for kind in KINDS}
            | {"over_ring": over.get(row.name)}
            for row in rows
        ],
    }


def document(machine: dict[str, Any], entries: list[dict[str, Any]]) -> Document:
    """For JSON."""
    return {"machine": machine, "original": ORIGINAL, "shapes": entries}


def chart(path: Path) -> None:
    """Ratios as bars, in a picture beside the JSON at ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = json.loads(path.read_text())
    machine = found["machine"]
    shapes = [x["shape"]["name"] for x in found["shapes"]]
    rows = {(row["shape"], row["name"]): row for x in found["shapes"] for row in x["rows"]}
    names = [name for name in dict.fromkeys(name for _, name in rows) if name != RING]
    width = 0.8 / max(len(names), 1)
    figure, axes = plt.subplots(2, 1, figsize=(15, 8), sharex=True)
    refused = {key for key, row in rows.items() if row["reason"] is not None}
    over = {key: row["over_ring"] or {} for key, row in rows.items()}
    for axis, kind in zip(axes, KINDS, strict=True):
        for n, name in enumerate(names):
            heights = [over.get((shape, name), {}).get(kind, 0) for shape in shapes]
            places = [x + (n - (len(names) - 1) / 2) * width for x in range(len(shapes))]
            axis.bar(places, heights, width, label=name)
            none = [x for x, s in zip(places, shapes, strict=True) if (s, name) in refused]
            axis.plot(none, [0.06] * len(none), "x", color=f"C{n}", markersize=5)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_ylabel(f"{TITLES[kind]}: time / the ring's")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.margins(x=0.01)
    axes[0].set_title(
        f"{machine['devices']} x {machine['device']}, jax {machine['jax']}, bfloat16. "
        f"Above 1: slower than the ring. x: no time, see the JSON. Original: {ORIGINAL}",
        fontsize="small",
    )
    axes[0].legend(ncols=4, fontsize="small")
    labels = [shape.replace("-varlen", "\nvarlen") for shape in shapes]
    axes[1].set_xticks(range(len(shapes)), labels, fontsize="small")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
