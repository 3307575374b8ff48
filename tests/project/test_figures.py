"""The figures of docs/performance.md and measuring.md are those of benchmarks/results/."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def tables(page: str) -> list[str]:
    """The tables of a page of the docs."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)


PLAIN, DETERMINISTIC, VARIED, BOTH_SIDES, RING, SCALING, *_ = tables("performance.md")
*_, RING_H200 = tables("measuring.md")

PEERS = ("mosaic_gpu", "triton", "fa3", "cudnn", "tokamax", "torch-flex")
MODES = ("mosaic_gpu", "mosaic_gpu_nondeterministic", "fa3-deterministic", "fa3")
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


def ring(table: str, file: str) -> None:
    found = {
        entry["shape"]["name"]: {row["name"]: row for row in entry["rows"]}
        for entry in json.loads((RESULTS / file).read_text())["shapes"]
    }
    for row, times in zip(cells(table), found.values(), strict=True):
        efficiency = times["one rank"]["both_ms"] / times["ring"]["both_ms"]
        one = f"{shown(times['one rank'])}; {100 * efficiency:.1f}%"
        same(row, [shown(times["ring"]), one, *(shown(times.get(name)) for name in OTHERS)])


def test_one_gpu():
    found: dict[str, dict] = {}
    for row in json.loads((RESULTS / "attention-nvidia-h100-80gb-hbm3.json").read_text())["rows"]:
        found.setdefault(row["shape"], {})[row["name"]] = row
    plain, varied = list(found.values())[:-3], list(found.values())[-3:]
    for table, rows, names in (
        (PLAIN, plain, PEERS),
        (DETERMINISTIC, plain, MODES),
        (VARIED, varied, PEERS[:4]),
    ):
        for row, times in zip(cells(table), rows, strict=True):
            same(row, [shown(times.get(name)) for name in names])


def test_both_sides():
    found: dict[str, dict] = {}
    file = RESULTS / "both-sides-nvidia-h100-80gb-hbm3.json"
    for row in json.loads(file.read_text())["rows"]:
        found.setdefault(row["shape"], {})[row["name"]] = row
    for row, times in zip(cells(BOTH_SIDES), found.values(), strict=True):
        same(row, [shown(times.get(name)) for name in ("mosaic_gpu", "cudnn", "fa3")])


@pytest.mark.parametrize(("table", "device"), [(RING, "h100-80gb-hbm3"), (RING_H200, "h200")])
def test_two_gpus(table, device):
    ring(table, f"ring-2x-nvidia-{device}.json")


def test_scaling():
    document = json.loads((RESULTS / "scaling-2x-nvidia-h100-80gb-hbm3.json").read_text())
    alone = {
        (x["kind"], x["window"]): x["ring"] for x in document["points"] if x["devices"] == 1
    } | {("weak", x["window"]): x["one_rank"] for x in document["points"] if x["kind"] == "weak"}
    points = [x for x in document["points"] if x["devices"] == 2]
    for row, point in zip(cells(SCALING), points, strict=True):
        one = alone[point["kind"], point["window"]]
        two = f"{point['ring']:.3f}; {100 * point['efficiency']:.1f}%"
        assert row == [point["window"], f"{one:.3f}", two]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_their_machine(path):
    """As notebooks/3_performance.ipynb reads them."""
    machine = json.loads(path.read_text())["machine"]
    assert machine["device"] and machine["jax"]
