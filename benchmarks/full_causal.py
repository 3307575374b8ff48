"""Times layers without a window, and long windows, on the GPUs that are here.

``python -m benchmarks.full_causal``. Within a row (`benchmarks._ring_shapes.LONG_SHAPES`) the
contenders (`benchmarks._full_contenders`) take turns, every round in another order, and ratios are
taken round by round: the median and the quartiles, forward and forward+backward. Efficiency is the
time of one GPU with the same arrays and kernels, over the devices' number and their time. Writes
JSON and a chart.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from benchmarks._exchanges import AXIS
from benchmarks._full_contenders import FULL, ONE_GPU, OURS, names_for, specs_of_whole
from benchmarks._gpus import clocks, connect, hold, share_machine
from benchmarks._report import KINDS, TITLES
from benchmarks._results import RESULTS, path_in, write
from benchmarks._ring_shapes import LONG_SHAPES, RingShape
from benchmarks._timing import in_turns, ratio_quartiles
from benchmarks.attention import IMPORTS, difference, machine, reason_of
from benchmarks.ring import arrays, specs


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
        return ratio_quartiles(getattr(self, kind), getattr(base, kind))


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


def check(
    programs: dict[str, Any], inputs: dict[str, tuple[Any, ...]]
) -> Iterator[tuple[str, str]]:
    """(name, reason) of those that fail, or are off ours."""
    expected = None
    for name, program in programs.items():
        if isinstance(program, str):
            yield name, program
            continue
        try:
            results = program[1](*inputs[name])
            expected = results if name == OURS else expected
            # A sequence in another order has other results; a whole one is on another device.
            if expected is not None and "dual_chunk" not in name and name != ONE_GPU:
                far = difference(results, expected)
                if not far <= 0.03:  # NaN too
                    yield name, f"off ours by {far:.2g}"
        except Exception as error:  # a peer may fail in any way; the table says how
            yield name, reason_of(error)


def measure(
    shape: RingShape, mesh: Mesh, programs: dict[str, Any], rounds: int, seconds: float
) -> list[Found]:
    """Times what was compiled, in turns."""
    whole = arrays(shape, mesh)
    inputs = {name: on_first(mesh, whole) if name == ONE_GPU else whole for name in programs}
    reasons = dict(check(programs, inputs))
    timed = {
        (name, kind): (program, args)
        for name in programs
        if name not in reasons
        for kind, program, args in zip(
            KINDS, programs[name], (inputs[name][:-1], inputs[name]), strict=True
        )
    }
    times, raised = in_turns(timed, rounds=rounds, seconds=seconds)
    reasons |= {name: reason_of(error) for (name, _), error in raised.items()}

    def found(name: str) -> Found:
        forward, both = (times.get((name, kind), []) for kind in KINDS)
        return Found(shape.name, name, forward, both, reasons.get(name))

    return [found(name) for name in programs]


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


def measure_row(shape: RingShape, mesh: Mesh, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: compiles, waits for the GPUs, times, prints."""
    names = [name for name in names_for(shape) if name in (arguments.only or FULL)]
    names = list(dict.fromkeys([OURS, *names, ONE_GPU]))
    with ThreadPoolExecutor(len(names)) as pool:
        futures = [
            pool.submit(compiled, shape, mesh, name, arguments.implementation) for name in names
        ]
        programs = {name: x.result() for name, x in zip(names, futures, strict=True)}
    hold(arguments.lock, range(mesh.size))
    before = clocks()
    seconds = 0.001 if arguments.quick else 0.08
    found = measure(shape, mesh, programs, arguments.rounds, seconds)
    print(table(shape, mesh.size, found), flush=True)
    return {
        "shape": dataclasses.asdict(shape),
        "before": before,
        "after": clocks(),
        "rows": [dataclasses.asdict(x) for x in found],
    }


def chart(path: Path) -> None:
    """Times over ours as bars, in a picture beside the JSON at ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    document = json.loads(path.read_text())
    where, entries = document["machine"], document["rows"]
    found = {e["shape"]["name"]: {x["name"]: Found(**x) for x in e["rows"]} for e in entries}
    names = [n for n in FULL if n not in (OURS, ONE_GPU) and any(n in x for x in found.values())]
    width, colors = 0.8 / max(len(names), 1), mpl.colormaps["tab20"]
    figure, axes = plt.subplots(2, 1, figsize=(15, 8), sharex=True, layout="constrained")
    for axis, kind in zip(axes, KINDS, strict=True):
        for n, name in enumerate(names):
            heights = []
            for rows in found.values():
                ratio = rows[name].over(rows[OURS], kind) if name in rows else None
                heights.append(ratio[1] if ratio else 0)
            places = [x + (n - (len(names) - 1) / 2) * width for x in range(len(found))]
            axis.bar(places, heights, width, label=name, color=colors(n))
        axis.axhline(1, color="black", linewidth=1)
        axis.set_ylabel(f"{TITLES[kind]}: time / ours")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_title(
        f"{where['devices']} x {where['device']}, jax {where['jax']}, bfloat16. "
        "Above 1: slower than ours. No bar: no time, see the JSON.",
        fontsize="small",
    )
    bars = axes[0].get_legend_handles_labels()
    figure.legend(*bars, loc="outside lower center", ncols=9, fontsize="small")
    axes[1].set_xticks(range(len(found)), list(found), fontsize="small")
    figure.savefig(path.with_suffix(".png"), dpi=120)
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
    parser.add_argument("--lock", type=Path, help="folder of locks, one for each GPU")
    arguments = parser.parse_args()
    share_machine()
    jax.config.update("jax_num_cpu_devices", arguments.devices or 2)
    if jax.default_backend() == "cpu" and not arguments.quick:
        parser.error("on a CPU there is only --quick")
    devices = arguments.devices or jax.device_count()
    where = machine() | {"devices": devices}
    print(where, flush=True)
    mesh = jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])
    connect(mesh)
    output = arguments.output or path_in(RESULTS, "full_causal", where)
    entries = []
    for name in arguments.rows:
        shape = LONG_SHAPES[name].tiny() if arguments.quick else LONG_SHAPES[name]
        entries.append(measure_row(shape, mesh, arguments))
        # After each, so that a run that is cut off leaves something.
        write(output, {"machine": where, "rows": entries})
    chart(output)
    print(f"wrote {output} and its picture")


if __name__ == "__main__":
    main()
