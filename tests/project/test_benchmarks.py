"""Benchmarks run on CPU devices, as trials, and write what they found."""

import argparse
import dataclasses
import fcntl
import itertools
import json
import sys

import jax
import pytest
from jax.sharding import AxisType

from benchmarks import (
    _model_report,
    _model_tables,
    _processes,
    _results,
    _scaling_report,
    _stack,
    lengths,
    ring,
    versions,
)
from benchmarks import all as every
from benchmarks._ring_report import ONE_RANK, RING
from benchmarks._ring_shapes import RingShape
from benchmarks._timing import in_turns
from tests.helpers.hlo import collectives
from tests.helpers.processes import CPU, ROOT, start, succeed

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "jax": "0.0"}


def test_programs_take_turns():
    calls = []

    def program(name):
        def run(x):
            calls.append(name)
            if name == "bad" or (name == "tires" and calls.count("tires") > 5):
                raise RuntimeError(name)
            return x

        return run, (1,)

    names = ["a", "b", "bad", "tires"]
    times, raised = in_turns({n: program(n) for n in names}, rounds=4, seconds=1e-9)
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4}
    assert {name: str(error) for name, error in raised.items()} == {"bad": "bad", "tires": "tires"}
    rounds = "".join(x for x in calls if x in "ab")[4:]  # two calls each say how long one takes
    assert {rounds[n : n + 2] for n in range(0, 8, 2)} == {"ab", "ba"}


def test_documents_merge(tmp_path):
    parts = [
        {"machine": MACHINE | {"devices": 4}, "clocks": {name: 1}, "rows": [name]} for name in "ab"
    ]
    whole = _results.merged(parts)
    assert whole == {"machine": MACHINE | {"devices": 4}, "clocks": {"a": 1, "b": 1},
                     "rows": ["a", "b"]}  # fmt: skip
    path = _results.path_in(tmp_path, "full_causal", whole["machine"])
    assert path.name == "full-causal-4x-nvidia-h100-80gb-hbm3.json"
    _results.write(path, whole)
    assert _results.read(path) == whole


WRITES = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'machine': %r, 'rows': [1]}))"


def test_a_run_survives_failing_and_late_jobs(tmp_path, monkeypatch, capsys):
    """Stand-ins: one job writes, one fails, one is late with a child of its own, one must wait."""
    lock = tmp_path / "lock"
    child = f"exec 9> {lock}; flock 9; echo held >&9; sleep 60"
    late = f"import subprocess; subprocess.run(['sh', '-c', {child!r}])"
    codes = {
        "good": WRITES % MACHINE,
        "bad": "raise SystemExit('no such GPU')",
        "late": f"{WRITES % MACHINE}; {late}",
        "waits": WRITES % MACHINE,
    }
    jobs = [
        _processes.Job("stand_in", name, ("-c", code, str(tmp_path / f"{name}.json")),
                       tmp_path / f"{name}.json")
        for name, code in codes.items()
    ]  # fmt: skip
    monkeypatch.setitem(every.BENCHMARKS, "stand_in", every.Benchmark(several=False))
    output = every.Output(tmp_path / "found", jobs)
    for ended in _processes.run(jobs, at_once=1, seconds=4):
        output.add(ended)
    assert output.missing == ["stand_in bad", "stand_in late", "stand_in waits"]
    (path,) = (tmp_path / "found").glob("*.json")
    assert _results.read(path)["rows"] == [1, 1]
    assert "bad: ENDED with 1: no such GPU" in capsys.readouterr().out
    assert "no such GPU" in (tmp_path / "found" / "stand_in.log").read_text()
    with lock.open("r+") as file:  # what a late job has started has ended too
        assert file.read() == "held\n"
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_pictures_of_lengths(tmp_path):
    rows = [
        {"shape": f"{row}-{length}", "name": name, "forward_tflops": 5e-3 * length,
         "both_tflops": 400.0}
        for row in ("causal-64", "packed-64")
        for length in lengths.LENGTHS
        for name in ("mosaic_gpu", "fa3")
    ]  # fmt: skip
    path = tmp_path / "lengths.json"
    _results.write(
        path, {"machine": MACHINE, "rows": [*rows, {"shape": "causal-64-1", "name": "x"}]}
    )
    points = lengths.series(rows, "packed-64", "fa3", "forward")
    assert points == [(length, 5e-3 * length) for length in lengths.LENGTHS]
    lengths.chart(path)
    assert [x.name for x in tmp_path.glob("*.png")] == ["lengths-64.png"]


def test_lengths_have_as_many_tokens():
    for row in lengths.ROWS:
        found = lengths.shapes(row, quick=False)
        assert {shape.batch * shape.length for shape in found} == {lengths.TOKENS}
        assert {shape.heads * shape.dim for shape in found} == {lengths.FEATURES}
        assert [len(shape.documents) or shape.batch for shape in found] == [
            lengths.TOKENS // length for length in lengths.LENGTHS
        ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in every.BENCHMARKS if name != "model"])
def test_first_row_of_each(tmp_path, name):
    """`test_model` is the model's."""
    arguments = argparse.Namespace(devices=2, quick=True)
    job = every.jobs_of(name, tmp_path, arguments)[0]
    few = ("--only", "all_to_all") if name == "full_causal" else ()
    job = dataclasses.replace(job, arguments=(*job.arguments, *few))
    output = every.Output(tmp_path / "found", [job])
    for ended in _processes.run([job], at_once=1, seconds=240):
        output.add(ended)
        assert ended.status == 0, ended.text
    (path,) = (tmp_path / "found").glob("*.json")
    assert _results.read(path)["machine"]["device"] == "cpu"
    assert every.BENCHMARKS[name].chart is None or list((tmp_path / "found").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_one_rank_with_keys_on_both_sides(devices):
    shape = RingShape("both", 64 * devices, 4, 2, 16, 9, after=5)
    mesh = jax.make_mesh((devices,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:devices])
    built = {name: ring.build(shape, mesh, name, "xla") for name in (RING, ONE_RANK)}
    whole = ring.arrays(shape, mesh)
    inputs = {name: x.inputs(*whole) for name, x in built.items()}
    assert list(ring.check(shape, mesh, built, inputs)) == []


def test_a_stack_hands_results_on():
    """Stand-ins: a layer's output and gradients are small integers."""

    def both(query, keys, ends, dout):
        key, value = keys
        out = query + 2 * key
        return out, (dout + 3 * value, (10 * key, value + out))

    inputs = _stack.forward_inputs((1, 5, None), 3)
    assert _stack.forward_of(lambda query, key, ends: query + 2 * key, 3)(*inputs) == 31
    inputs = (1, (5, 7), None, 2)
    # query, key, value, dout: 1, 5, 7, 2; 11, 50, 18, 23; 111, 500, 129, 77
    assert _stack.both_of(both, 2)(*inputs) == (111, (500, 129), None, 77)


@pytest.mark.parametrize("kind", ["forward", "both"])
def test_a_stack_exchanges_keys_in_every_layer(kind):
    shape = RingShape("stack", 32, 2, 1, 8, 5)
    mesh = jax.make_mesh((2,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:2])
    layer = ring.layer_of(shape, mesh, RING, "xla")
    counts = []
    for layers in (1, 3):
        if kind == "forward":
            program = _stack.forward_of(layer.forward, layers)
            types = _stack.forward_inputs(layer.types[:-1], layers)
        else:
            program, types = _stack.both_of(layer.both, layers), layer.types
        found = collectives(jax.jit(program).lower(*types).compile().as_text())
        counts.append(sum(x.kind == "collective-permute" for x in found))
    assert counts[1] == 3 * counts[0] > 0


def test_tables_of_scaling():
    weak = {"kind": "weak", "window": "512+512", "devices": 4, "layers": 8, "reason": None}
    weak |= {"ring_forward": 0.5, "ring": 2.0, "one_rank_forward": 0.45, "one_rank": 1.9}
    weak |= {"alone_forward": 0.9, "alone": 2.5, "efficiency_forward": 0.9, "efficiency": 0.95}
    failed = {"kind": "weak", "window": "127", "devices": 4, "ring": None, "reason": "no memory"}
    strong = [
        {"kind": "strong", "window": "127", "devices": 1, "ring": 3.0, "efficiency": 1.0},
        {"kind": "strong", "window": "127", "devices": 4, "ring": 1.0, "efficiency": 0.75},
    ]
    points = [weak, failed, *strong]
    of_weak, of_strong = _scaling_report.tables({"points": points})
    row = "| (512, 512) | 4 | 0.450 / 1.900 | 0.500 / 2.000 | 90.0% / 95.0% | 0.900 / 2.500 |"
    assert of_weak.splitlines()[2:] == [row]
    assert of_strong.splitlines()[2:] == ["| 127 | 3.000 | 1.000; 75.0% |"]


def model_row(contender, length, seq=4, **found):
    """One of the whole-model benchmark, of gpt-oss."""
    job = {"model": "gpt-oss", "contender": contender, "data": 1, "seq": seq, "batch": 1}
    return {"job": job | {"length": length * 1024}} | found


def test_later_rows_of_models_take_the_place_of_earlier_ones(tmp_path):
    memory = {"memory": {"all": 3 * 2**30}}
    old = [
        model_row("ours", 64, seconds=2.0, seconds_over_ours=1.0),
        model_row("all-gather + cuDNN", 64, seconds=3.0, seconds_over_ours=1.5),
        model_row("ours", 16, seq=1, seconds=1.0),
        model_row("ours", 128, **memory),
    ]
    old[3]["job"]["steps"] = 0  # its program was only compiled
    new = [
        model_row("ours", 64, seconds=1.0, peak=2**30, **memory),
        model_row("ours", 128, seconds=4.0, **memory),
        model_row("ours", 16, seq=1, reason="its process ended with -9"),
    ]
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, rows, day, loss in zip(paths, (old, new), "12", (0.5, 0.7), strict=True):
        machine = MACHINE | {"devices": 4, "date": f"2026-01-0{day}"}
        checks = {"gpt-oss": {"ours": {"loss": loss}}}
        _results.write(path, {"machine": machine, "checks": checks, "rows": rows})
    _model_report.merge(*paths)
    whole = _results.read(paths[0])
    assert whole["machine"]["date"] == "2026-01-02" and paths[0].with_suffix(".png").exists()
    assert whole["checks"]["gpt-oss"]["ours"]["loss"] == 0.7
    found = [
        (x["job"]["contender"], x["job"]["length"] // 1024, x["seconds"], x["date"][-2:])
        for x in whole["rows"]
    ]
    assert found == [
        ("ours", 64, 1.0, "02"),
        ("all-gather + cuDNN", 64, 3.0, "01"),
        ("ours", 16, 1.0, "01"),
        ("ours", 128, 4.0, "02"),
    ]
    assert whole["rows"][1]["seconds_over_ours"] == 3.0
    speed, utilisation, memory = (x.splitlines()[2:] for x in _model_tables.tables(whole["rows"]))
    assert speed[0] == "| gpt-oss | 4 | 1 x 64k | **65,536** | 21,845; 3.00 | - | 1.30 |"
    assert [x.split(" | ")[1:3] for x in speed[1:]] == [["4", "1 x 128k"], ["1", "1 x 16k"]]
    of_four, of_one = (whole["rows"][n]["mfu"] for n in (0, 2))
    ratio = f"{of_one:.1%}, {of_four:.1%}; {of_four / of_one:.2f}"
    assert utilisation == [f"| gpt-oss | 4 | 1 x 64k | {ratio} | - | - |"]
    assert memory == ["| gpt-oss | 4 | 1 x 64k | 1.0 | - | - |",
                      "| gpt-oss | 4 | 1 x 128k | (3.0) | - | - |"]  # fmt: skip


def written(tmp_path, module, *flags):
    """The JSON of a trial."""
    output = tmp_path / "found.json"
    flags = ("--quick", "--devices=2", f"--output={output}", f"--lock={tmp_path}", *flags)
    succeed([start("-m", f"benchmarks.{module}", *flags, **CPU)])
    assert output.with_suffix(".png").exists()
    return json.loads(output.read_text())


@pytest.mark.slow
def test_ring(tmp_path):
    names = ["sliding-1000", "streaming-varlen-1000"]
    flags = ("--shapes", *names, "--only", "one rank", "all-gather + ours")
    shapes = written(tmp_path, "ring", *flags)["shapes"]
    assert [entry["shape"]["name"] for entry in shapes] == names
    for entry in shapes:
        assert len(entry["rows"]) == 3
        assert all(row["reason"] is None and row["both_ms"] > 0 for row in entry["rows"])


@pytest.mark.slow
def test_scaling(tmp_path):
    rows = ["weak-127", "weak-512+512", "strong-24575"]
    points = written(tmp_path, "scaling", "--rows", *rows)["points"]
    assert {(x["kind"], x["devices"]) for x in points} == {
        ("weak", 2),
        ("strong", 1),
        ("strong", 2),
    }
    assert all(x["reason"] is None and x["efficiency"] > 0 for x in points)
    for x in points:
        if x["kind"] == "weak":
            assert x["layers"] == 2 and x["efficiency_forward"] > 0
            assert min(x["alone_forward"], x["one_rank_forward"], x["one_rank"]) > 0
            assert x["ring_forward"] < x["ring"]


@pytest.mark.slow
def test_compile_time(tmp_path):
    output = tmp_path / "found.json"
    flags = ("--repeats=1", "--layers=1", f"--output={output}")
    succeed([start("-m", "benchmarks.compile_time", *flags, **CPU)])
    rows = json.loads(output.read_text())["rows"]
    found = [(row["window"], row["name"]) for row in rows]
    assert found == list(itertools.product((255, 1023, None), ("dense", "ours")))
    assert all(row["total"] > row["compile"] > 0 for row in rows)


def test_another_version_is_imported_from_its_checkout(tmp_path, monkeypatch):
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    texts = {"ring_swa_jax": "from pallas_kernels import number", "pallas_kernels": "number = 7"}
    for package, text in texts.items():
        (checkout / package).mkdir(parents=True)
        (checkout / package / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"{package}_before", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert versions.package_of(checkout, copy).number == 7


@pytest.mark.slow
def test_versions(tmp_path):
    output = tmp_path / "found.json"
    flags = ("--quick", "--rounds=2", "--implementation=xla", f"--output={output}")
    shapes = ("--shapes", "gptoss", "mistral-packed")
    succeed([start("-m", "benchmarks.versions", str(ROOT), *flags, *shapes, **CPU)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["shape"] for row in rows] == ["gptoss", "mistral-packed"]
    for row in rows:
        assert {(x["name"], x["kind"]) for x in row["rounds"]} == set(
            itertools.product(("before", "now", "now again"), ("forward", "both"))
        )
        assert all(len(x["seconds"]) == 2 for x in row["rounds"])


@pytest.mark.slow
def test_decoding(tmp_path):
    output = tmp_path / "found.json"
    flags = ("--steps=one-1-sinks", "--quick", f"--output={output}")
    succeed([start("-m", "benchmarks.decoding", *flags, **CPU)])
    [(name, times)] = json.loads(output.read_text())["microseconds"].items()
    assert name == "one-1-sinks" and min(times["ours"], times["xla"]) > 0
    assert isinstance(times["cudnn"], str)  # why a CPU has no such time


@pytest.mark.slow
def test_model(tmp_path):
    names = ["ours", "all-gather + cuDNN", "all-to-all + cuDNN"]
    found = written(tmp_path, "model", "--models=gpt-oss", "--jobs=4")
    assert {row["job"]["contender"] for row in found["rows"]} == set(names)
    losses = [row["loss"] for row in found["rows"]]
    assert max(losses) - min(losses) < 0.01
    checks = found["checks"]["gpt-oss"]
    assert list(checks) == names
    assert all("reason" not in check for check in checks.values())
