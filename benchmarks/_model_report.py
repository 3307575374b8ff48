"""What the whole-model benchmark found: lines, JSON, a picture."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks import _results
from benchmarks._model_contenders import CONTENDERS, OURS
from benchmarks._model_jobs import Job
from benchmarks._model_sizes import MODELS

GIB = 2**30
Row = dict[str, Any]
"""A `Job` as a dictionary, and what was found."""


def job_of(row: Row) -> Job:
    """The job of a row."""
    return Job(**row["job"])


def derived(row: Row, rows: list[Row], *, quick: bool) -> Row:
    """Tokens a second, model FLOPs utilisation, and ratios to ours; nothing where nothing ran."""
    job = job_of(row)
    if "seconds" not in row or "reason" in row or quick:
        return {}
    seconds = row["seconds"]
    size = MODELS[job.model]
    found: Row = {
        "tokens_per_second": job.batch * job.length / seconds,
        "mfu": size.utilisation(job.batch, job.length, job.devices, seconds),
    }
    base = next((x for x in rows if _is_ours(x, job) and "seconds" in x), None)
    if base is not None:
        per_group = job.batch // job.data
        flops = [
            size.busiest_flops(name, per_group, job.length, job.seq)
            for name in (job.contender, OURS)
        ]
        found["seconds_over_ours"] = seconds / base["seconds"]
        found["allowed_over_ours"] = flops[0] / flops[1]
    return found


def _is_ours(row: Row, job: Job) -> bool:
    other = job_of(row)
    return other.contender == OURS and (
        (other.model, other.data, other.seq, other.batch, other.length)
        == (job.model, job.data, job.seq, job.batch, job.length)
    )


def line(row: Row, rows: list[Row], *, quick: bool) -> str:
    """One row as text."""
    job, more = job_of(row), derived(row, rows, quick=quick)
    memory = row.get("memory", {}).get("all", 0) / GIB
    cells = [
        f"{job.model:11s} {job.data}x{job.seq} B {job.batch} S {job.length // 1024:5d}k",
        f"{job.contender:19s}",
        f"{row['seconds']:8.3f} s" if "seconds" in row else f"{'-':>10s}",
        f"{more['tokens_per_second']:9.0f} tok/s MFU {more['mfu']:.3f}" if more else "",
        f"{memory:5.1f} GiB (ran in {row.get('peak', 0) / GIB:.1f})",
        f"compiled {row.get('compile', 0):3.0f} s",
    ]
    if "seconds_over_ours" in more:
        cells.append(f"{more['seconds_over_ours']:.3f} (FLOPs: {more['allowed_over_ours']:.3f})")
    if "loss" in row:
        cells.append(f"loss {row['loss']:.5f} |g| {row['gradient_norm']:.4f}")
    return "  ".join(x for x in [*cells, row.get("reason", "")] if x)


def write(path: Path, where: Row, rows: list[Row], checks: Row, *, quick: bool) -> None:
    """The JSON."""
    entries = [row | derived(row, rows, quick=quick) for row in rows]
    _results.write(path, {"machine": where, "checks": checks, "rows": entries})


def merge(path: Path, later: Path) -> None:
    """Adds what a later JSON has to the one at ``path``, and draws its picture anew.

    A later row takes the place of one of the same step, unless it alone was not timed. Rows that
    stay say of which day they are, if it is another.
    """
    old, new = _results.read(path), _results.read(later)
    rows = {_step(row): {"date": old["machine"]["date"]} | row for row in old["rows"]}
    for row in new["rows"]:
        if "seconds" in row or "seconds" not in rows.get(_step(row), {}):
            rows[_step(row)] = {"date": new["machine"]["date"]} | row
    checks = old["checks"] | new["checks"]
    write(path, new["machine"], list(rows.values()), checks, quick=False)
    chart(path)


def _step(row: Row) -> Job:
    """What tells a row from others: all of its job but how it was measured."""
    return dataclasses.replace(job_of(row), steps=0, profile=False)


def chart(path: Path) -> None:
    """Tokens a second on all devices, by model and length, beside the JSON at ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    document = json.loads(path.read_text())
    where = document["machine"]
    rows = [row for row in document["rows"] if "seconds" in row and "reason" not in row]
    if not rows:
        return
    devices = where["devices"]
    models = list(dict.fromkeys(row["job"]["model"] for row in rows))
    figure, axes = plt.subplots(
        1, len(models), figsize=(4 * len(models), 4), squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[0], models, strict=True):
        own = [row for row in rows if row["job"]["model"] == model and job_of(row).seq == devices]
        own = [row for row in own if row["job"]["batch"] == 1]
        lengths = sorted({row["job"]["length"] for row in own})
        for n, name in enumerate(CONTENDERS):
            rates = {
                row["job"]["length"]: row["job"]["length"] / row["seconds"]
                for row in own
                if row["job"]["contender"] == name
            }
            places = [x + 0.27 * (n - 1) for x in range(len(lengths))]
            axis.bar(places, [rates.get(x, 0) for x in lengths], 0.25, label=name)
        axis.set_xticks(range(len(lengths)), [f"{x // 1024}k" for x in lengths])
        axis.set_title(model)
        axis.set_xlabel("tokens of the sequence")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0][0].set_ylabel("tokens a second")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize="small")
    figure.suptitle(
        f"A training step on {devices} x {where['device']}, jax {where['jax']}, one sequence",
        fontsize="medium",
    )
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)
