"""How the ring scales with the GPUs that are here: ``python -m benchmarks.scaling``.

Weak scaling: 16384 tokens a GPU, over 2, 4, 8 and 16 of them, as far as they are there. Efficiency
is the time of one GPU that does the work of the ring's busiest device, with the keys around it in
its memory, over the ring's, the median of rounds. Strong scaling: as many tokens, cut over 1, 2 and
so on, also with a window that reaches over several chunks where there are many, and without a
window; the time of one GPU over that of so many, and over their number. Forward and backward in
bfloat16; JSON and a chart.
"""

import argparse
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh

from benchmarks._exchanges import AXIS
from benchmarks._gpus import connect, hold, share_machine
from benchmarks._results import RESULTS, path_in, write
from benchmarks._ring_report import ONE_RANK, RING
from benchmarks._ring_shapes import LONG_SHAPES, RingShape
from benchmarks._timing import in_turns, median_of, ratio_quartiles
from benchmarks.attention import machine, reason_of
from benchmarks.ring import Built, arrays, build

A_GPU, ALL_TOKENS = 16384, 131072
LAYERS = {
    "127": RingShape("127", A_GPU, 64, 8, 64, 127),
    "1023": RingShape("1023", A_GPU, 32, 8, 128, 1023),
    "4095": RingShape("4095", A_GPU, 32, 8, 128, 4095),
    "8191": RingShape("8191", A_GPU, 32, 8, 128, 8191),
    "512+512": RingShape("512+512", A_GPU, 32, 8, 128, 512, after=512),
    "2048+2048": RingShape("2048+2048", A_GPU, 32, 8, 128, 2048, after=2048),
}
"""By window."""
LONG = RingShape("24575", ALL_TOKENS, 32, 8, 128, 24575)
STRONG = [dataclasses.replace(LAYERS[name], length=ALL_TOKENS) for name in ("127", "4095")] + [LONG]
STRONG += [LONG_SHAPES[name] for name in ("full-64k", "gptoss-full", "gemma-full", "packed-full")]
ROWS = {f"weak-{name}": ("weak", shape) for name, shape in LAYERS.items()}
ROWS |= {f"strong-{shape.name}": ("strong", shape) for shape in STRONG}


@dataclasses.dataclass(frozen=True)
class Point:
    """Milliseconds on so many devices, forward and backward; None and a reason if it did not run.

    ``window`` is the name of the shape. ``one_rank`` is the yardstick of weak scaling, whose rounds
    over the ring's have the quartiles ``quartiles``.
    """

    kind: str
    window: str
    devices: int
    ring: float | None = None
    one_rank: float | None = None
    quartiles: tuple[float, float, float] | None = None
    reason: str | None = None


def mesh_of(devices: int) -> Mesh:
    """The first ones."""
    return jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])


def measured(
    point: Point, built: dict[str, Built | str], shape: RingShape, mesh: Mesh, seconds: float
) -> Point:
    """The point with its times, taken in turns, or with the reason why there are none."""
    try:
        if reasons := [x for x in built.values() if isinstance(x, str)]:
            raise RuntimeError(reasons[0])
        whole = arrays(shape, mesh)
        programs = {
            name: (x.both, x.inputs(*whole)) for name, x in built.items() if isinstance(x, Built)
        }
        times, raised = in_turns(programs, rounds=5, seconds=seconds)
        for error in raised.values():
            raise error
    except Exception as error:  # out of memory, say; the others go on
        return dataclasses.replace(point, reason=reason_of(error))
    ring, one_rank = (
        None if (time := median_of(times.get(name))) is None else 1e3 * time
        for name in (RING, ONE_RANK)
    )
    quartiles = ratio_quartiles(times.get(ONE_RANK, []), times[RING])
    return dataclasses.replace(point, ring=ring, one_rank=one_rank, quartiles=quartiles)


def shorter(shape: RingShape, times: int) -> RingShape:
    """So many times shorter, for a trial."""
    documents = tuple(max(x // times // 8, 1) * 8 for x in shape.documents)
    return dataclasses.replace(
        shape,
        length=sum(documents) or shape.length // times,
        window=None if shape.window is None else max(shape.window // times, 1),
        after=shape.after and max(shape.after // times, 1),
        documents=documents,
    )


def measure(row: str, most: int, arguments: argparse.Namespace) -> list[Point]:
    """The points of a row: compiles all, waits for the GPUs, times."""
    kind, shape = ROWS[row]
    counts = [n for n in (1, 2, 4, 8, 16) if n <= most]
    names = [RING]
    if kind == "weak":
        counts, names = counts[1:], [RING, ONE_RANK]
    jobs = []
    for n in counts:
        whole = dataclasses.replace(shape, length=A_GPU * n) if kind == "weak" else shape
        jobs.append((shorter(whole, 128) if arguments.quick else whole, mesh_of(n)))
    with ThreadPoolExecutor(len(jobs) * len(names)) as pool:
        built = [
            {
                name: pool.submit(build, whole, mesh, name, arguments.implementation)
                for name in names
            }
            for whole, mesh in jobs
        ]
    for _, mesh in jobs:
        connect(mesh)
    hold(arguments.lock, range(most))
    return [
        measured(
            Point(kind, shape.name, mesh.size),
            {name: future.result() for name, future in futures.items()},
            whole,
            mesh,
            0.001 if arguments.quick else 0.06,
        )
        for (whole, mesh), futures in zip(jobs, built, strict=True)
    ]


def efficiency(point: Point, points: list[Point]) -> float | None:
    """Of weak scaling beside one rank, of strong scaling beside one GPU."""
    if point.ring is None:
        return None
    if point.kind == "weak":
        return None if point.quartiles is None else point.quartiles[1]
    alone = {x.window: x.ring for x in points if x.kind == "strong" and x.devices == 1}
    time = alone.get(point.window)
    return None if time is None else time / point.devices / point.ring


def chart(path: Path) -> None:
    """Efficiency over the number of GPUs, in a picture beside the JSON at ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    document = json.loads(path.read_text())
    where, points = document["machine"], document["points"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = {"weak": f"weak: {A_GPU} tokens a GPU", "strong": "strong: as many tokens in all"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for window in dict.fromkeys(x["window"] for x in points if x["kind"] == kind):
            found = [
                (x["devices"], x["efficiency"])
                for x in points
                if (x["kind"], x["window"]) == (kind, window) and x["efficiency"]
            ]
            if found:
                axis.plot(*zip(*found, strict=True), "o-", label=window)
        axis.axhline(0.95, color="0.7", linewidth=0.8)
        axis.set(title=title, xlabel="GPUs", ylim=(0, 1.1))
        axis.set_xticks(sorted({x["devices"] for x in points}))
        if axis.lines[:-1]:
            axis.legend(fontsize="small", loc="lower left")
    axes[0].set_ylabel("efficiency, forward + backward")
    figure.suptitle(f"{where['device']}, jax {where['jax']}, bfloat16", fontsize="medium")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    plt.close(figure)


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--devices", type=int, help="at most; default: all that are here")
    parser.add_argument("--implementation", help="of ours; default: the best for the device")
    parser.add_argument("--quick", action="store_true", help="sequences a 128th as long: a trial")
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
    output = arguments.output or path_in(RESULTS, "scaling", where)
    entries = []
    for row in arguments.rows:
        points = measure(row, devices, arguments)
        for point in points:
            entries.append(dataclasses.asdict(point) | {"efficiency": efficiency(point, points)})
            print({name: x for name, x in entries[-1].items() if x is not None}, flush=True)
        # After each, so that a run that is cut off leaves something.
        write(output, {"machine": where, "points": entries})
    chart(output)
    print(f"wrote {output} and its picture")


if __name__ == "__main__":
    main()
