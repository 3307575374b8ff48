"""What the ring's benchmark found: as a table a shape, as JSON, as a chart."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks._ring_memory import Memory
from benchmarks._ring_shapes import ORIGINAL, RingShape

RING, ONE_RANK = "ring", "one rank"
KINDS = ("forward", "both")


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of a contender on a shape; None and a reason where it did not run.

    ``memory`` holds pairs of what the compiler says and the formula's, by kind of program.
    """

    shape: str
    name: str
    forward: float | None = None
    both: float | None = None
    reason: str | None = None
    memory: dict[str, tuple[Memory, Memory | None]] = dataclasses.field(default_factory=dict)

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
                found.setdefault(row.name, {})[kind] = time / base
    return found


def table(shape: RingShape, devices: int, rows: list[Row]) -> str:
    """Lines of one shape."""
    lines = [
        f"\n{shape.name}: B {shape.batch}, S {shape.length} over {devices}, heads "
        f"{shape.heads}/{shape.kv_heads}, H {shape.dim}, window {shape.window}, sinks "
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


def write(path: Path, machine: dict[str, Any], shapes: list[RingShape], rows: list[Row]) -> None:
    """The JSON, and beside it the chart. Ratios are times over the ring's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    for shape in shapes:
        found = [row for row in rows if row.shape == shape.name]
        over = ratios(found)
        entries.append(
            {
                "shape": dataclasses.asdict(shape),
                "busiest_rank": shape.busiest(machine["devices"]),
                "rows": [
                    dataclasses.asdict(row)
                    | {f"{kind}_ms": row.milliseconds(kind) for kind in KINDS}
                    | {"over_ring": over.get(row.name)}
                    for row in found
                ],
            }
        )
    document = {"machine": machine, "original": ORIGINAL, "shapes": entries}
    path.write_text(json.dumps(document, indent=1) + "\n")
    _chart(path.with_suffix(".png"), machine, shapes, rows)
    print(f"\nwrote {path} and {path.with_suffix('.png')}")


def _chart(path: Path, machine: dict[str, Any], shapes: list[RingShape], rows: list[Row]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    over = {s.name: ratios([row for row in rows if row.shape == s.name]) for s in shapes}
    names = list(dict.fromkeys(name for found in over.values() for name in found))
    width = 0.8 / max(len(names), 1)
    figure, axes = plt.subplots(2, 1, figsize=(15, 8), sharex=True)
    refused = {(row.shape, row.name) for row in rows if row.reason is not None}
    for axis, kind, title in zip(axes, KINDS, ("forward", "forward + backward"), strict=True):
        for n, name in enumerate(names):
            heights = [over[s.name].get(name, {}).get(kind, 0) for s in shapes]
            places = [x + (n - (len(names) - 1) / 2) * width for x in range(len(shapes))]
            axis.bar(places, heights, width, label=name)
            none = [x for x, s in zip(places, shapes, strict=True) if (s.name, name) in refused]
            axis.plot(none, [0.06] * len(none), "x", color=f"C{n}", markersize=5)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_ylabel(f"{title}: time / the ring's")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.margins(x=0.01)
    axes[0].set_title(
        f"{machine['devices']} x {machine['device']}, jax {machine['jax']}, bfloat16. "
        f"Above 1: slower than the ring. x: no time, see the JSON. Original: {ORIGINAL}",
        fontsize="small",
    )
    axes[0].legend(ncols=4, fontsize="small")
    labels = [s.name.replace("-varlen", "\nvarlen") for s in shapes]
    axes[1].set_xticks(range(len(shapes)), labels, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
