"""What a comparison found: as a table, as JSON, as a chart, and against an earlier one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks._shapes import ALL

TOLERANCE = 1.03
"""Times differ by this much between runs of the same program."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Seconds of a contender on a shape; None and a reason where it did not run."""

    shape: str
    name: str
    ours: bool
    forward: float | None = None
    both: float | None = None
    reason: str | None = None

    def rates(self) -> dict[str, float]:
        """Milliseconds and useful TFLOP/s of what was timed."""
        shape = ALL[self.shape]
        found: dict[str, float] = {}
        forward, backward = shape.forward_flops() / 1e12, shape.backward_flops() / 1e12
        if self.forward is not None:
            found |= {"forward_ms": self.forward * 1e3, "forward_tflops": forward / self.forward}
        if self.both is not None:
            found |= {"both_ms": self.both * 1e3, "both_tflops": (forward + backward) / self.both}
        if self.forward is not None and self.both is not None:
            found["backward_tflops"] = backward / (self.both - self.forward)
        return found


def table(shape: str, rows: list[Row]) -> str:
    """Lines of one shape; a ratio above 1 is faster than the best peer."""
    peers = [row for row in rows if not row.ours]
    forward = min((row.forward for row in peers if row.forward), default=None)
    both = min((row.both for row in peers if row.both), default=None)
    settings = ALL[shape]
    lines = [
        f"\n{shape}: T {settings.length}, heads {settings.heads}/{settings.kv_heads}, "
        f"H {settings.dim}, window {settings.window}, sinks {settings.sinks}, "
        f"{len(settings.documents) or 1} sequences",
        f"  {'':20s} {'forward':>24s} {'forward+backward':>26s} {'backward':>9s}",
        f"  {'':20s} {'ms':>8s} {'TFLOP/s':>8s} {'ratio':>6s}"
        f"   {'ms':>8s} {'TFLOP/s':>8s} {'ratio':>6s} {'TFLOP/s':>9s}",
    ]
    for row in rows:
        rates, cells = row.rates(), []
        for kind, best in (("forward", forward), ("both", both)):
            seconds = getattr(row, kind)
            if seconds is None:
                cells.append(f"{'-':>8s} {'-':>8s} {'-':>6s}")
                continue
            ratio = f"{best / seconds:6.2f}" if best else f"{'-':>6s}"
            cells.append(f"{rates[f'{kind}_ms']:8.3f} {rates[f'{kind}_tflops']:8.0f} {ratio}")
        backward = f"{rates['backward_tflops']:9.0f}" if "backward_tflops" in rates else ""
        reason = f"  {row.reason}" if row.reason else ""
        lines.append(f"  {row.name:20s} {'   '.join(cells)} {backward:>9s}{reason}")
    return "\n".join(lines)


def write(path: Path, machine: dict[str, Any], rows: list[Row]) -> None:
    """The JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [dataclasses.asdict(row) | row.rates() for row in rows]
    path.write_text(json.dumps({"machine": machine, "rows": entries}, indent=1) + "\n")


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
    now = {(row.shape, row.name): row for row in rows if row.ours}
    found = []
    for old in before:
        row = now.get((old["shape"], old["name"]))
        if row is None:
            continue
        for kind in ("forward", "both"):
            was, seconds = old[kind], getattr(row, kind)
            title = f"{row.shape} {row.name} {'forward+backward' if kind == 'both' else kind}"
            if was is not None and seconds is None:
                found.append(f"{title}: {was * 1e3:.3f} ms, now none: {row.reason}")
            elif was is not None and seconds > was * TOLERANCE:
                change = 100 * (seconds / was - 1)
                found.append(f"{title}: {was * 1e3:.3f} -> {seconds * 1e3:.3f} ms (+{change:.0f}%)")
    return found


def chart(path: Path, machine: dict[str, Any], rows: list[Row]) -> None:
    """Useful TFLOP/s as bars, in a picture beside the JSON at ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row.shape for row in rows))
    names = list(dict.fromkeys(row.name for row in rows if row.forward or row.both))
    rates = {(row.shape, row.name): row.rates() for row in rows}
    width = 0.8 / max(len(names), 1)
    figure, axes = plt.subplots(2, 1, figsize=(13, 8), sharex=True)
    for axis, kind, title in zip(
        axes, ("forward", "both"), ("forward", "forward + backward"), strict=True
    ):
        for n, name in enumerate(names):
            heights = [rates.get((s, name), {}).get(f"{kind}_tflops", 0) for s in shapes]
            places = [x + (n - (len(names) - 1) / 2) * width for x in range(len(shapes))]
            axis.bar(places, heights, width, label=name)
        axis.set_ylabel(f"{title}, useful TFLOP/s")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_title(f"{machine['device']}, jax {machine['jax']}, bfloat16, batch 1")
    axes[0].legend(ncols=4, fontsize="small")
    axes[1].set_xticks(range(len(shapes)), shapes)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
