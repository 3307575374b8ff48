"""Times layers without a window, and long windows, on the GPUs that are here.

``python -m benchmarks.full_causal``: every row (`benchmarks._ring_shapes.LONG_SHAPES`) is compiled
in a process of its own, all at the same time; they take turns on the GPUs by a file lock. Within a
row the contenders (`benchmarks._full_contenders`) take turns too, every round in another order, and
ratios are taken round by round: the median and the quartiles, forward and forward+backward.
Efficiency is the time of one GPU with the same arrays and kernels, over the devices' number and
their time. Writes JSON and a chart.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from benchmarks._exchanges import AXIS
from benchmarks._full_contenders import FULL, ONE_GPU, OURS, names_for, specs_of_whole
from benchmarks._ring_shapes import LONG_SHAPES, RingShape
from benchmarks._timing import calls_within, median_seconds
from benchmarks.attention import IMPORTS, difference, machine, reason_of
from benchmarks.ring import arrays, specs

KINDS = ("forward", "both")


@dataclasses.dataclass(frozen=True)
class Found:
    """Seconds of a contender in each round; a reason where there are none."""

    shape: str
    name: str
    forward: list[float]
    both: list[float]
    reason: str | None = None

    def over(self, base: "Found", kind: str) -> tuple[float, float, float] | None:
        """Quartiles of its times over another's, round by round."""
        mine, others = getattr(self, kind), getattr(base, kind)
        if len(mine) < 2 or len(others) < 2:
            return None
        ratios = [x / y for x, y in zip(mine, others, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high


def compiled(shape: RingShape, mesh: Mesh, name: str, implementation: str | None):
    """(forward, forward and backward), or the reason why there are none."""
    contender, types = FULL[name], specs(shape, mesh)
    try:
        with IMPORTS:
            attend: Any = contender.build(shape, mesh.size, implementation)
        if name == ONE_GPU:
            types = specs_of_whole(types, SingleDeviceSharding(mesh.devices.flat[0]))
        if not contender.whole:
            cut = P(None, AXIS)
            attend = jax.shard_map(
                attend,
                mesh=mesh,
                in_specs=(cut, cut, cut, P()),
                out_specs=cut,
                check_vma=False,  # cuDNN's primitives know nothing of it
            )

        def both(query, key, value, ends, dout):
            out, pull = jax.vjp(lambda *x: attend(*x, ends), query, key, value)
            return out, pull(dout)

        options = contender.options or None
        return (
            jax.jit(attend).lower(*types[:-1]).compile(),
            jax.jit(both).lower(*types).compile(compiler_options=options),
        )
    except Exception as error:  # a peer may fail in any way; the table says how
        return reason_of(error)


def on_first(mesh: Mesh, whole: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arrays as a whole on the first device."""
    first = mesh.devices.flat[0]
    replicated = NamedSharding(mesh, P())
    copies = jax.tree.map(lambda x: jax.device_put(x, replicated), whole)
    return jax.tree.map(
        lambda x: next(s.data for s in x.addressable_shards if s.device == first), copies
    )


def measure(
    shape: RingShape, mesh: Mesh, programs: dict[str, Any], rounds: int, seconds: float
) -> list[Found]:
    """Times what was compiled, in turns."""
    whole = arrays(shape, mesh)
    inputs = {name: on_first(mesh, whole) if name == ONE_GPU else whole for name in programs}
    reasons = {name: x for name, x in programs.items() if isinstance(x, str)}
    calls: dict[tuple[str, int], int] = {}
    expected = None
    for name in programs:
        if name in reasons:
            continue
        try:
            for n, program in enumerate(programs[name]):
                args = inputs[name] if n else inputs[name][:-1]
                calls[name, n] = calls_within(seconds, program, *args)
            results = programs[name][1](*inputs[name])
            expected = results if name == OURS else expected
            # A sequence in another order has other results; a whole one is on another device.
            if expected is not None and "dual_chunk" not in name and name != ONE_GPU:
                far = difference(results, expected)
                if not far <= 0.03:  # NaN too
                    raise ArithmeticError(f"off ours by {far:.2g}")
        except Exception as error:  # a peer may fail in any way; the table says how
            reasons[name] = reason_of(error)
            calls = {key: count for key, count in calls.items() if key[0] != name}
    results = expected = None
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    order = random.Random(0)
    for _ in range(rounds):
        for name, n in order.sample(list(calls), len(calls)):
            args = inputs[name] if n else inputs[name][:-1]
            once = median_seconds(programs[name][n], *args, calls=calls[name, n], repeats=1)
            times[name, n].append(once)
    return [
        Found(shape.name, name, times.get((name, 0), []), times.get((name, 1), []),
              reasons.get(name))
        for name in programs
    ]  # fmt: skip


def table(shape: RingShape, devices: int, found: list[Found]) -> str:
    """Lines of one shape."""
    (base,) = (x for x in found if x.name == OURS)
    lines = [
        f"\n{shape.name}: S {shape.length} over {devices}, heads {shape.heads}/{shape.kv_heads}, "
        f"H {shape.dim}, window {shape.window}, {len(shape.documents) or 1} sequences"
        f"{', learned sinks' if shape.learned else ''}",
        f"  {'':24s} {'forward ms':>10s}  {'/ ours (quartiles)':>22s}   {'both ms':>8s}  "
        f"{'/ ours (quartiles)':>22s}",
    ]
    for row in found:
        cells = []
        for kind in KINDS:
            times, ratio = getattr(row, kind), row.over(base, kind)
            shown = f"{statistics.median(times) * 1e3:10.3f}" if times else f"{'-':>10s}"
            if ratio is not None:
                shown += f"  {ratio[1]:7.3f} ({ratio[0]:.3f}-{ratio[2]:.3f})"
            cells.append(f"{shown:34s}")
        note = f"  {row.reason}" if row.reason else ""
        lines.append(f"  {row.name:24s} {' '.join(cells)}{note}")
    (one,) = (x for x in found if x.name == ONE_GPU)
    for kind in KINDS:
        if (ratio := one.over(base, kind)) is not None:
            lines.append(f"  efficiency of ours, {kind}: {ratio[1] / devices:.3f}")
    return "\n".join(lines)


def measure_row(arguments: argparse.Namespace) -> None:
    """One row in this process: compiles, waits for the GPUs, times, writes its part."""
    shape = LONG_SHAPES[arguments.row]
    shape = shape.tiny() if arguments.quick else shape
    mesh = jax.make_mesh(
        (arguments.devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[: arguments.devices]
    )
    names = [name for name in names_for(shape) if name in (arguments.only or FULL)]
    names = list(dict.fromkeys([OURS, *names, ONE_GPU]))
    with ThreadPoolExecutor(len(names)) as pool:
        futures = [
            pool.submit(compiled, shape, mesh, name, arguments.implementation) for name in names
        ]
        programs = {name: x.result() for name, x in zip(names, futures, strict=True)}
    with arguments.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = clocks()
        seconds = 0.001 if arguments.quick else 0.08
        found = measure(shape, mesh, programs, arguments.rounds, seconds)
        print(table(shape, mesh.size, found), flush=True)
        entry = {
            "shape": dataclasses.asdict(shape),
            "before": before,
            "after": clocks(),
            "rows": [dataclasses.asdict(x) for x in found],
        }
        arguments.output.write_text(json.dumps(entry))
        # The memory goes back before the next process has its turn.
        os._exit(0)


def clocks() -> list[str]:
    """Clock, temperature and power of each NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=clocks.sm,temperature.gpu,power.draw"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def measure_all(arguments: argparse.Namespace, devices: int) -> Iterator[dict[str, Any]]:
    """All rows, each in a process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.full_causal", f"--devices={devices}"]
        command += [f"--lock={arguments.lock or folder + '/lock'}", f"--rounds={arguments.rounds}"]
        command += ["--quick"] if arguments.quick else []
        command += ["--only", *arguments.only] if arguments.only else []
        if arguments.implementation:
            command.append(f"--implementation={arguments.implementation}")
        started = {}
        for name in arguments.rows:
            part = Path(folder) / f"{name}.json"
            row = [*command, f"--row={name}", f"--output={part}"]
            started[name] = (subprocess.Popen(row), part)
        for name, (process, part) in started.items():
            process.wait()
            if part.exists():
                yield json.loads(part.read_text())
            else:
                print(f"{name}: the process ended with {process.returncode}", flush=True)


def chart(path: Path, where: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Times over ours, as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = {e["shape"]["name"]: {x["name"]: Found(**x) for x in e["rows"]} for e in entries}
    names = [n for n in FULL if n not in (OURS, ONE_GPU) and any(n in x for x in found.values())]
    width = 0.8 / len(names)
    figure, axes = plt.subplots(2, 1, figsize=(15, 8), sharex=True, layout="constrained")
    for axis, kind, title in zip(axes, KINDS, ("forward", "forward + backward"), strict=True):
        for n, name in enumerate(names):
            heights = []
            for rows in found.values():
                ratio = rows[name].over(rows[OURS], kind) if name in rows else None
                heights.append(ratio[1] if ratio else 0)
            places = [x + (n - (len(names) - 1) / 2) * width for x in range(len(found))]
            axis.bar(places, heights, width, label=name, color=f"C{n}" if n < 10 else str(n / 20))
        axis.axhline(1, color="black", linewidth=1)
        axis.set_ylabel(f"{title}: time / ours")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_title(
        f"{where['devices']} x {where['device']}, jax {where['jax']}, bfloat16. "
        "Above 1: slower than ours. No bar: no time, see the JSON.",
        fontsize="small",
    )
    axes[0].legend(ncols=6, fontsize="x-small")
    axes[1].set_xticks(range(len(found)), list(found), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Compiles, times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(LONG_SHAPES), default=list(LONG_SHAPES))
    parser.add_argument("--only", nargs="+", choices=list(FULL), help="beside ours and one GPU")
    parser.add_argument("--devices", type=int, help="how many; default: all GPUs, or 2 CPU devices")
    parser.add_argument("--implementation", help="of ours; default: the best for the device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a smoke test")
    parser.add_argument("--output", type=Path, help="JSON to write; default: benchmarks/results/")
    parser.add_argument("--lock", type=Path, help="file that who times on these GPUs holds")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_num_cpu_devices", arguments.devices or 2)
    if arguments.row:
        measure_row(arguments)
        return
    if jax.default_backend() == "cpu" and not arguments.quick:
        parser.error("on a CPU there is only --quick")
    devices = arguments.devices or jax.device_count()
    where = machine() | {"devices": devices}
    print(where, flush=True)
    slug = "-".join(where["device"].lower().split())
    results = Path(__file__).parent / "results"
    output = arguments.output or results / f"full-causal-{devices}x-{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    for entry in measure_all(arguments, devices):
        entries.append(entry)
        # After each, so that a run that is cut off leaves something.
        output.write_text(json.dumps({"machine": where, "rows": entries}, indent=1) + "\n")
    chart(output.with_suffix(".png"), where, entries)
    print(f"wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
