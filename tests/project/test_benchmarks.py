"""Benchmarks run on CPU devices, as trials, and write what they found."""

import json

import pytest

from tests.helpers.processes import CPU, start, succeed

pytestmark = pytest.mark.slow


def written(tmp_path, module, *flags):
    """The JSON of a trial."""
    output = tmp_path / "found.json"
    flags = ("--quick", "--devices=2", f"--output={output}", *flags)
    succeed([start("-m", f"benchmarks.{module}", *flags, **CPU)])
    assert output.with_suffix(".png").exists()
    return json.loads(output.read_text())


def test_ring(tmp_path):
    names = ["sliding-1000", "streaming-varlen-1000"]
    flags = ("--shapes", *names, "--only", "one rank", "all-gather + ours")
    shapes = written(tmp_path, "ring", *flags)["shapes"]
    assert [entry["shape"]["name"] for entry in shapes] == names
    for entry in shapes:
        assert len(entry["rows"]) == 3
        assert all(row["reason"] is None and row["both_ms"] > 0 for row in entry["rows"])


def test_scaling(tmp_path):
    points = written(tmp_path, "scaling")["points"]
    assert {(x["kind"], x["devices"]) for x in points} == {
        ("weak", 2),
        ("strong", 1),
        ("strong", 2),
    }
    assert all(x["reason"] is None and x["efficiency"] > 0 for x in points)


def test_compile_time(tmp_path):
    output = tmp_path / "found.json"
    flags = ("--repeats=1", "--layers=1", f"--output={output}")
    succeed([start("-m", "benchmarks.compile_time", *flags, **CPU)])
    rows = json.loads(output.read_text())["rows"]
    found = [(row["window"], row["name"]) for row in rows]
    assert found == [(255, "dense"), (255, "ours"), (None, "dense"), (None, "ours")]
    assert all(row["total"] > row["compile"] > 0 for row in rows)


def test_decoding(tmp_path):
    output = tmp_path / "found.json"
    flags = ("--steps=one-1-sinks", "--count=2", "--repeats=1", f"--output={output}")
    succeed([start("-m", "benchmarks.decoding", *flags, **CPU)])
    [(name, times)] = json.loads(output.read_text())["microseconds"].items()
    assert name == "one-1-sinks" and min(times["ours"], times["xla"]) > 0
    assert isinstance(times["cudnn"], str)  # why a CPU has no such time


def test_model(tmp_path):
    names = ["ours", "all-gather + cuDNN", "all-to-all + cuDNN"]
    found = written(tmp_path, "model", "--models=gpt-oss", "--jobs=4")
    assert {row["job"]["contender"] for row in found["rows"]} == set(names)
    losses = [row["loss"] for row in found["rows"]]
    assert max(losses) - min(losses) < 0.01
    checks = found["checks"]["gpt-oss"]
    assert list(checks) == names
    assert all("reason" not in check for check in checks.values())
