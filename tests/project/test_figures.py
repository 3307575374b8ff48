"""The figures of the docs and the README are those of benchmarks/results/."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import _model_tables, _scaling_report
from benchmarks._model_contenders import ALL_GATHER, ALL_TO_ALL, OURS
from benchmarks._model_sizes import MODELS
from benchmarks._shapes import BOTH_SIDES, SHAPES, VARIED

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def tables(page: str) -> list[str]:
    """The tables of a page of the docs."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)


PLAIN, DETERMINISTIC, VARIED_TABLE, BOTH_SIDES_TABLE, RING, *_ = tables("performance.md")
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


def rows_of(*benchmarks: str) -> dict[str, dict[str, dict]]:
    """{shape: {contender: its row}} on one H100, of a later benchmark where two have the shape."""
    found: dict[str, dict[str, dict]] = {}
    for benchmark in benchmarks:
        file = RESULTS / f"{benchmark}-nvidia-h100-80gb-hbm3.json"
        for row in json.loads(file.read_text())["rows"]:
            found.setdefault(row["shape"], {})[row["name"]] = row
    return found


@pytest.mark.parametrize(
    ("table", "shapes", "names"),
    [
        (PLAIN, SHAPES, PEERS),
        (DETERMINISTIC, SHAPES, MODES),
        (VARIED_TABLE, VARIED, PEERS[:4]),
        (BOTH_SIDES_TABLE, BOTH_SIDES, ("mosaic_gpu", "cudnn", "fa3")),
    ],
    ids=["peers", "deterministic", "varied", "both sides"],
)
def test_one_gpu(table, shapes, names):
    found = rows_of("both-sides", "attention")
    for row, shape in zip(cells(table), shapes, strict=True):
        same(row, [shown(found[shape].get(name)) for name in names])


@pytest.mark.parametrize(("table", "device"), [(RING, "h100-80gb-hbm3"), (RING_H200, "h200")])
def test_two_gpus(table, device):
    ring(table, f"ring-2x-nvidia-{device}.json")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("scaling-*.json")), ids=lambda x: x.stem)
def test_scaling(path):
    found = _scaling_report.tables(json.loads(path.read_text()))
    assert found and set(found) <= {table.rstrip() for table in tables("performance.md")}


def test_whole_models():
    rows = json.loads((RESULTS / "model-4x-nvidia-h100-80gb-hbm3.json").read_text())["rows"]
    page = {table.rstrip() for table in tables("whole_models.md")}
    assert len(found := _model_tables.tables(rows)) == 3
    assert set(found) <= page
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = {}
    for row in rows:
        job = row["job"]
        if (job["data"], job["seq"], job["batch"], job["length"]) == (1, 4, 1, 65536):
            said[job["model"], job["contender"]] = row
    for model in MODELS:
        assert f"{said[model, OURS]['tokens_per_second']:,.0f}" in text
    for name in (ALL_GATHER, ALL_TO_ALL):
        *first, last = (f"{said[model, name]['seconds_over_ours']:.2f}" for model in MODELS)
        assert f"{', '.join(first)} and {last} times" in text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_their_machine(path):
    """As notebooks/3_performance.ipynb reads them."""
    machine = json.loads(path.read_text())["machine"]
    assert machine["device"] and machine["jax"]
