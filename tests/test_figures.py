"""The figures of docs/performance.md are those of benchmarks/results/."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
ONE_GPU, ONE_GPU_MOSAIC, WIDE_AND_SINKS, FIVE_ROWS, RING, RING_MOSAIC, RING_FUSED = re.findall(
    r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE
)

ATTENTION = "attention-nvidia-h100-80gb-hbm3"
PEERS = ("triton", "cudnn", "fa3", "fa3-deterministic", "tokamax", "torch-flex")
PEERS_MOSAIC = (
    "triton",
    "mosaic_gpu",
    "mosaic_gpu_nondeterministic",
    "cudnn",
    "fa3",
    "tokamax",
)
OTHERS = ("all-gather + ours", "all-gather + cuDNN", "all-to-all + cuDNN", "original (copied)")


def cells(table: str) -> list[list[str]]:
    """Right of the first column and below the header, without bold."""
    rows = [line.strip("|").split("|")[1:] for line in table.replace("*", "").splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def shown(row: dict | None) -> str | None:
    """Both times; None where there are not both."""
    times = [row and row.get(kind) for kind in ("forward_ms", "both_ms")]
    return None if None in times else " / ".join(f"{time:.3f}" for time in times)


def same(row: list[str], expected: list[str | None]) -> None:
    for cell, value in zip(row, expected, strict=True):
        assert cell == value or (value is None and "/" not in cell), (row, cell, value)


def ring(table: str, file: str, shapes: tuple[str, ...], names: tuple[str, ...]) -> None:
    found = {
        entry["shape"]["name"]: {row["name"]: row for row in entry["rows"]}
        for entry in json.loads((RESULTS / file).read_text())["shapes"]
    }
    for row, shape in zip(cells(table), shapes or found, strict=True):
        times = found[shape]
        efficiency = times["one rank"]["both_ms"] / times["ring"]["both_ms"]
        one = f"{shown(times['one rank'])}; {100 * efficiency:.1f}%"
        same(row, [shown(times["ring"]), one, *(shown(times.get(name)) for name in names)])


def one_gpu(table: str, file: str, names: tuple[str, ...]) -> None:
    found: dict[str, dict] = {}
    for row in json.loads((RESULTS / file).read_text())["rows"]:
        found.setdefault(row["shape"], {})[row["name"]] = row
    for row, times in zip(cells(table), found.values(), strict=True):
        same(row, [shown(times[name]) for name in names])


def test_one_gpu():
    one_gpu(ONE_GPU, f"{ATTENTION}.json", PEERS)


def test_one_gpu_with_mosaic():
    one_gpu(ONE_GPU_MOSAIC, f"{ATTENTION}-mosaic-gpu.json", PEERS_MOSAIC)


def test_parts_of_one_gpu():
    ours = PEERS_MOSAIC[1:3]
    one_gpu(WIDE_AND_SINKS, f"parts/{ATTENTION}-wide-and-sinks.json", ("triton", *ours, "cudnn"))
    one_gpu(FIVE_ROWS, f"parts/{ATTENTION}-five-rows.json", (*ours, "cudnn", "fa3"))


def test_two_gpus():
    ring(RING, "ring-2x-nvidia-h200.json", (), OTHERS)


def test_two_gpus_with_mosaic():
    shapes = ("sliding-1000", "sliding-4000", "streaming-1000", "mistral", "gptoss")
    ring(RING_MOSAIC, "ring-2x-nvidia-h200-mosaic-gpu.json", shapes, OTHERS[-1:])


def test_two_gpus_with_fused_backward():
    ring(RING_FUSED, "ring-2x-nvidia-h100-80gb-hbm3.json", (), OTHERS[-1:])
