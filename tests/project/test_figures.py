"""The figures of the docs and the README are those of benchmarks/results/."""

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import _attention_tables, _model_tables, _scaling_report, decoding
from benchmarks._model_contenders import ALL_GATHER, ALL_TO_ALL, OURS
from benchmarks._model_sizes import MODELS
from benchmarks._results import path_in
from benchmarks._ring_shapes import LONG_SHAPES
from benchmarks._timing import ratio_quartiles
from benchmarks.full_causal import Found

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def tables(page: str) -> list[str]:
    """The tables of a page of the docs."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)


[RING] = [x for x in tables("performance.md") if "the original" in x]
*_, FULL_FOUR, FULL_TWO, LONG_WINDOWS = tables("performance.md")
_, CHOICE, FULL_EXCHANGES, _ = tables("how_it_works.md")
[CHANGES] = [x for x in tables("measuring.md") if "the version before" in x]
*_, RING_H200 = tables("measuring.md")

PLAIN_HEADS = ("plain + our kernel", "plain + cuDNN", "plain + FA3")
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


def one_gpu() -> list[str]:
    """The tables of one GPU as their benchmarks print them."""
    attention, steps = (
        json.loads((RESULTS / f"{name}-nvidia-h100-80gb-hbm3.json").read_text())
        for name in ("attention", "decoding")
    )
    return [*_attention_tables.tables(attention["rows"]), decoding.table(steps)]


def scaled() -> list[str]:
    """The tables of `benchmarks.scaling`, of all its files."""
    files = sorted(RESULTS.glob("scaling-*.json"))
    return [x for path in files for x in _scaling_report.tables(json.loads(path.read_text()))]


def test_performance():
    """All tables of the page that have no test of their own below."""
    others = [x.rstrip() for x in (RING, FULL_FOUR, FULL_TWO, LONG_WINDOWS)]
    found = sorted(x.rstrip() for x in tables("performance.md"))
    assert found == sorted([*one_gpu(), *scaled(), *others])


def test_fastest_peers():
    """What the README and the page say of the fastest peer beside ours, forward and backward."""
    rows = json.loads((RESULTS / "attention-nvidia-h100-80gb-hbm3.json").read_text())["rows"]
    ratios = []
    for shape in ("gptoss", "long-gqa", "gemma3"):
        times = {row["name"]: row["rounds"].get("both") for row in rows if row["shape"] == shape}
        peers = (times[name] for name in ("fa3", "cudnn", "tokamax"))
        found = [ratio_quartiles(x, times["mosaic_gpu"]) for x in peers if x]
        ratios.append(min(x[1] for x in found))
    said = f"takes {ratios[0]:.1f}, {ratios[1]:.2f} and {ratios[2]:.2f} times as long"
    for page in ("README.md", "docs/performance.md"):
        assert said in " ".join((ROOT / page).read_text(encoding="utf-8").split())


@pytest.mark.parametrize(("table", "device"), [(RING, "h100-80gb-hbm3"), (RING_H200, "h200")])
def test_two_gpus(table, device):
    ring(table, f"ring-2x-nvidia-{device}.json")


def test_whole_models():
    rows = json.loads((RESULTS / "model-4x-nvidia-h100-80gb-hbm3.json").read_text())["rows"]
    page = {table.rstrip() for table in tables("whole_models.md")}
    assert len(found := _model_tables.tables(rows)) == 4
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


def full_causal(devices: int) -> dict[str, dict[str, Found]]:
    """{shape: {contender: its times}} of layers without a window and of long windows."""
    machine = {"device": "NVIDIA H100 80GB HBM3", "devices": devices}
    entries = json.loads(path_in(RESULTS, "full_causal", machine).read_text())["rows"]
    return {x["shape"]["name"]: {row["name"]: Found(**row) for row in x["rows"]} for x in entries}


def times_of(row: Found | None) -> str | None:
    """Median milliseconds of both."""
    if row is None or not row.both:
        return None
    return " / ".join(f"{1e3 * statistics.median(x):.2f}" for x in (row.forward, row.both))


def ratios(row: Found, base: Found, *, factor: float = 1.0, digits: int = 2) -> str:
    """Medians of the rounds' ratios, of both."""
    medians = (row.over(base, kind)[1] for kind in ("forward", "both"))
    return " / ".join(f"{factor * x:.{digits}f}" for x in medians)


@pytest.mark.parametrize(("table", "devices"), [(FULL_FOUR, 4), (FULL_TWO, 2)])
def test_without_a_window(table, devices):
    found = {name: x for name, x in full_causal(devices).items() if not name.startswith("window")}
    for row, times in zip(cells(table), found.values(), strict=True):
        efficiency = ratios(times["one GPU"], times["ours"], factor=100 / devices, digits=1)
        others = (times_of(times.get(name)) for name in (*PLAIN_HEADS, "plain + FA3, det."))
        same(row, [f"{times_of(times['ours'])}; {efficiency}%", *others])


def test_long_windows():
    found = {n: full_causal(n) for n in (4, 2)}
    rows = [
        times
        for of in found.values()
        for name, times in of.items()
        if name.startswith("window") and name != "window-64k"  # which sees all
    ]
    for row, times in zip(cells(LONG_WINDOWS), rows, strict=True):
        same(row, [times_of(times[name]) for name in ("halo", "all_to_all", *PLAIN_HEADS)])
    for row, name in zip(cells(CHOICE), ("8k", "12k", "16k", "32k"), strict=True):
        shape = LONG_SHAPES[f"window-{name}"]
        times = (found[n].get(shape.name) for n in (4, 2))
        over = [x and ratios(x["all_to_all"], x["halo"]) for x in times]
        same(row, [str(round(shape.window**2 / 2 / shape.length)), *over])


def test_changes_since_the_tables():
    file = RESULTS / "changes-nvidia-h100-80gb-hbm3.json"
    expected = []
    for row in json.loads(file.read_text())["rows"]:
        times, over_peer = row["seconds"], "-"
        for peer, name in ("fa3", "FlashAttention-3"), ("cudnn", "cuDNN"):
            if peer in times:
                before, now = (ratio_quartiles(times[x], times[peer])[1] for x in ("before", "now"))
                over_peer = f"{name}: {before:.2f}, {now:.2f}"
        over_before = ratio_quartiles(times["now"], times["before"])[1]
        expected.append([f"{over_before:.2f}", over_peer])
    assert cells(CHANGES) == expected


def test_exchanges_without_a_window():
    found = full_causal(4)
    names = ("all_to_all, dual_chunk", "ring", "ring, dual_chunk", "plain + our kernel")
    expected = [[times_of(found[shape]["ours"]) for shape in ("full-64k", "full-128k")]]
    for name in names:
        both = (found[shape] for shape in ("full-64k", "full-128k"))
        expected.append([f"{times_of(x[name])}; {ratios(x[name], x['ours'])}" for x in both])
    for row, values in zip(cells(FULL_EXCHANGES), expected, strict=True):
        same(row, values)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_their_machine(path):
    """As notebooks/3_performance.ipynb reads them."""
    machine = json.loads(path.read_text())["machine"]
    assert machine["device"] and machine["jax"]
