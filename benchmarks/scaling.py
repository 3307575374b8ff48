"""How the ring scales with the GPUs that are here: ``python -m benchmarks.scaling``.

Weak scaling: 16384 tokens a GPU, over 2, 4, 8 and 16 of them, as far as they are there. Efficiency
is the time of one GPU that does the work of the ring's busiest device, with the keys before it in
its memory, over the ring's. Strong scaling: as many tokens, cut over 1, 2 and so on, also with a
window that reaches over several chunks where there are many, and without a window; the time of one
GPU over that of so many, and over their number. Forward and backward in bfloat16; JSON and a chart.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from benchmarks._exchanges import AXIS
from benchmarks._ring_report import ONE_RANK, RING
from benchmarks._ring_shapes import LONG_SHAPES, RingShape
from benchmarks._timing import calls_within, median_seconds
from benchmarks.attention import machine, reason_of
from benchmarks.ring import Built, arrays, build

A_GPU, ALL_TOKENS = 16384, 131072
LAYERS = {
    "127": RingShape("127", A_GPU, 64, 8, 64, 127),
    "1023": RingShape("1023", A_GPU, 32, 8, 128, 1023),
    "4095": RingShape("4095", A_GPU, 32, 8, 128, 4095),
    "8191": RingShape("8191", A_GPU, 32, 8, 128, 8191),
}
"""By window."""
LONG = RingShape("24575", ALL_TOKENS, 32, 8, 128, 24575)
STRONG = [dataclasses.replace(LAYERS[name], length=ALL_TOKENS) for name in ("127", "4095")] + [LONG]
STRONG += [LONG_SHAPES[name] for name in ("full-64k", "gptoss-full", "gemma-full", "packed-full")]


@dataclasses.dataclass(frozen=True)
class Point:
    """Milliseconds on so many devices, forward and backward; None and a reason if it did not run.

    ``window`` is the name of the shape. ``one_rank`` is the yardstick of weak scaling.
    """

    kind: str
    window: str
    devices: int
    ring: float | None = None
    one_rank: float | None = None
    reason: str | None = None


def mesh_of(devices: int) -> Mesh:
    """The first ones."""
    return jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])


def seconds(built: dict[str, Built | str], shape: RingShape, mesh: Mesh) -> dict[str, float]:
    """Time of each, in turns."""
    if reasons := [x for x in built.values() if isinstance(x, str)]:
        raise RuntimeError(reasons[0])
    whole = arrays(shape, mesh)
    inputs = {name: x.inputs(*whole) for name, x in built.items() if isinstance(x, Built)}
    programs = {name: x.both for name, x in built.items() if isinstance(x, Built)}
    calls = {name: calls_within(0.06, programs[name], *inputs[name]) for name in programs}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(5):
        for name, program in programs.items():
            once = median_seconds(program, *inputs[name], calls=calls[name], repeats=1)
            times[name].append(once)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(implementation: str | None, most: int, shorten: int) -> Iterator[Point]:
    """All points, the sequences so many times shorter."""

    def short(shape: RingShape, length: int) -> RingShape:
        window = None if shape.window is None else max(shape.window // shorten, 1)
        documents = tuple(max(x // shorten // 8, 1) * 8 for x in shape.documents)
        if documents and shorten > 1:
            length = sum(documents) * shorten
        return dataclasses.replace(
            shape, length=length // shorten, window=window, documents=documents
        )

    counts = [n for n in (1, 2, 4, 8, 16) if n <= most]
    jobs: list[tuple[str, str, int, RingShape, tuple[str, ...]]] = [
        ("weak", name, n, short(shape, A_GPU * n), (RING, ONE_RANK))
        for name, shape in LAYERS.items()
        for n in counts[1:]
    ]
    jobs += [
        ("strong", shape.name, n, short(shape, shape.length), (RING,))
        for shape in STRONG
        for n in counts
    ]
    for kind, window, devices, shape, names in jobs:
        mesh = mesh_of(devices)
        try:
            built = {name: build(shape, mesh, name, implementation) for name in names}
            found = seconds(built, shape, mesh)
            ring, one_rank = (found[n] * 1e3 if n in found else None for n in (RING, ONE_RANK))
            yield Point(kind, window, devices, ring, one_rank)
        except Exception as error:  # out of memory, say; the others go on
            yield Point(kind, window, devices, reason=reason_of(error))


def efficiency(point: Point, points: list[Point]) -> float | None:
    """Of weak scaling beside one rank, of strong scaling beside one GPU."""
    if point.ring is None:
        return None
    if point.kind == "weak":
        return None if point.one_rank is None else point.one_rank / point.ring
    alone = {x.window: x.ring for x in points if x.kind == "strong" and x.devices == 1}
    time = alone.get(point.window)
    return None if time is None else time / point.devices / point.ring


def chart(path: Path, where: dict[str, Any], points: list[Point]) -> None:
    """Efficiency over the number of GPUs."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = {"weak": f"weak: {A_GPU} tokens a GPU", "strong": "strong: as many tokens in all"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for window in dict.fromkeys(x.window for x in points if x.kind == kind):
            found = [
                (x.devices, share)
                for x in points
                if (x.kind, x.window) == (kind, window) and (share := efficiency(x, points))
            ]
            if found:
                axis.plot(*zip(*found, strict=True), "o-", label=window)
        axis.axhline(0.95, color="0.7", linewidth=0.8)
        axis.set(title=title, xlabel="GPUs", ylim=(0, 1.1))
        axis.set_xticks(sorted({x.devices for x in points}))
        axis.legend(fontsize="small", loc="lower left")
    axes[0].set_ylabel("efficiency, forward + backward")
    figure.suptitle(f"{where['device']}, jax {where['jax']}, bfloat16", fontsize="medium")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, help="at most; default: all that are here")
    parser.add_argument("--implementation", help="of ours; default: the best for the device")
    parser.add_argument("--quick", action="store_true", help="sequences a 128th as long: a trial")
    parser.add_argument("--output", type=Path, help="JSON to write; default: benchmarks/results/")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices or 2)
    if jax.default_backend() == "cpu" and not arguments.quick:
        parser.error("on a CPU there is only --quick")
    devices = arguments.devices or jax.device_count()
    where = machine() | {"devices": devices}
    print(where, flush=True)
    slug = "-".join(where["device"].lower().split())
    results = Path(__file__).parent / "results"
    output = arguments.output or results / f"scaling-{devices}x-{slug}.json"
    points: list[Point] = []
    for point in measure(arguments.implementation, devices, 128 if arguments.quick else 1):
        points.append(point)
        entries = [dataclasses.asdict(x) | {"efficiency": efficiency(x, points)} for x in points]
        print({name: value for name, value in entries[-1].items() if value is not None}, flush=True)
        # After each, so that a run that is cut off leaves something.
        output.write_text(json.dumps({"machine": where, "points": entries}, indent=1) + "\n")
    chart(output.with_suffix(".png"), where, points)
    print(f"wrote {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
