"""What the whole-model benchmark found, as tables for a page."""

from collections.abc import Callable
from typing import Any

from benchmarks import _markdown
from benchmarks._model_contenders import CONTENDERS, OURS
from benchmarks._model_report import GIB, Row, job_of
from benchmarks._model_sizes import MODELS

Group = dict[str, Row]
"""The rows of one model, mesh and length by contender."""


def tables(rows: list[Row]) -> list[str]:
    """Tokens a second, MFU of all GPUs beside that of one, profiles, memory: if they have lines."""
    found = (_speed(rows), _utilisation(rows), _profiles(rows), _memory(rows))
    return [table for table in found if table]


def _groups(rows: list[Row]) -> list[tuple[list[str], Group]]:
    """With the cells that name them; many GPUs before few, then by length, then by model."""
    found: dict[tuple[Any, ...], Group] = {}
    for row in rows:
        job = job_of(row)
        key = -job.devices, job.length, job.data, job.batch, list(MODELS).index(job.model)
        found.setdefault(key, {})[job.contender] = row
    named = []
    for key in sorted(found):
        job = job_of(next(iter(found[key].values())))
        gpus = f"{job.data} x {job.seq}" if job.data > 1 else str(job.seq)
        named.append(([job.model, gpus, f"{job.batch} x {job.length // 1024}k"], found[key]))
    return named


NAMES = ["model", "GPUs", "batch x tokens"]


def _speed(rows: list[Row]) -> str:
    """Tokens a second; seconds over ours. Last, the ratios that the FLOPs allow."""
    lines = []
    for names, group in _groups([row for row in rows if "tokens_per_second" in row]):
        fastest = max(row["tokens_per_second"] for row in group.values())

        def cell(row: Row, fastest: float = fastest) -> str:
            rate = f"{row['tokens_per_second']:,.0f}"
            rate = f"**{rate}**" if row["tokens_per_second"] == fastest else rate
            ours = job_of(row).contender == OURS or "seconds_over_ours" not in row
            return rate if ours else f"{rate}; {row['seconds_over_ours']:.2f}"

        others = [group[name] for name in CONTENDERS if name != OURS and name in group]
        ratios = [row.get("allowed_over_ours") for row in others]
        allowed = ", ".join(f"{x:.2f}" for x in ratios if x is not None)
        lines.append([*names, *_cells(group, cell), allowed or "-"])
    return _markdown.table([*NAMES, *CONTENDERS, "allowed"], lines)


def _utilisation(rows: list[Row]) -> str:
    """MFU on one GPU, on all with as many tokens each, and the latter over the former."""
    timed = [row for row in rows if "mfu" in row and job_of(row).batch == 1]
    alone: dict[tuple[Any, ...], float] = {}
    for row in timed:
        job = job_of(row)
        if job.devices == 1:
            names = [OURS] if job.contender == OURS else [x for x in CONTENDERS if x != OURS]
            alone |= {(job.model, job.length, name): row["mfu"] for name in names}

    def cell(row: Row) -> str:
        job = job_of(row)
        one = alone.get((job.model, job.length // job.devices, job.contender))
        return "-" if one is None else f"{one:.1%}, {row['mfu']:.1%}; {row['mfu'] / one:.2f}"

    lines = []
    for names, group in _groups([row for row in timed if job_of(row).devices > 1]):
        cells = _cells(group, cell)
        if set(cells) != {"-"}:
            lines.append([*names, *cells])
    return _markdown.table([*NAMES, *CONTENDERS], lines)


PROFILED = {
    "whole step": ("wall",),
    "matrix products": ("matrix products",),
    "attention kernels": ("attention, ours", "attention, cuDNN"),
    "other elementwise": ("other elementwise",),
    "copies": ("copies",),
    "collectives": ("collectives",),
    "collectives alone": ("collectives, exposed",),
    "idle": ("idle",),
}
"""Columns, and what each sums of a profile."""


def _profiles(rows: list[Row]) -> str:
    """Milliseconds of a device, the mean of all, where a step was taken apart."""
    lines = []
    for names, group in _groups([row for row in rows if "mean" in row.get("profile", {})]):
        for contender, row in group.items():
            mean = row["profile"]["mean"]
            sums = (sum(mean[kind] for kind in kinds) for kinds in PROFILED.values())
            lines.append([*names, contender, *(f"{x:.1f}" for x in sums)])
    return _markdown.table([*NAMES, "contender", *PROFILED], lines)


def _memory(rows: list[Row]) -> str:
    """GiB of a device at their peak; of a program that did not run, what the compiler says."""

    def cell(row: Row) -> str:
        if "peak" in row:
            return f"{row['peak'] / GIB:.1f}"
        return f"({row['memory']['all'] / GIB:.1f})"

    groups = _groups([row for row in rows if "memory" in row])
    lines = [[*names, *_cells(group, cell)] for names, group in groups]
    return _markdown.table([*NAMES, *CONTENDERS], lines)


def _cells(group: Group, cell: Callable[[Row], str]) -> list[str]:
    """One for each contender."""
    return [cell(group[name]) if name in group else "-" for name in CONTENDERS]
