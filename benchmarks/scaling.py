"""How the ring scales with the GPUs that are here: ``python -m benchmarks.scaling``.

Weak scaling: 16384 tokens a GPU, over 2, 4, 8 and 16 of them, as far as they are there. One program
has eight layers, as a training step is one program of many, and its time is divided by eight; the
time of a program of one layer, which a call from Python starts anew on each GPU, stands beside it.
Efficiency is the time of one GPU that does the work of the ring's busiest device, with the keys
around it in its memory and as many layers a program, over the ring's, the median of rounds.
Forward, and forward and backward.

Strong scaling: as many tokens, cut over 1, 2 and so on, also with a window that reaches over
several chunks where there are many, and without a window; programs of one layer, forward and
backward. Efficiency is the time of one GPU over that of so many, and over their number.

In bfloat16; JSON and a chart.
"""

import argparse
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from benchmarks import _scaling_report, _stack
from benchmarks._exchanges import AXIS
from benchmarks._gpus import connect, hold, share_machine
from benchmarks._results import RESULTS, path_in, read, write
from benchmarks._ring_report import KINDS, ONE_RANK, RING
from benchmarks._ring_shapes import LONG_SHAPES, RingShape
from benchmarks._scaling_report import Point, Program, efficiencies, figures
from benchmarks._timing import in_turns
from benchmarks.attention import machine, reason_of
from benchmarks.ring import arrays, layer_of

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


Compiled = tuple[Any, Callable[..., tuple[Any, ...]]]
"""A program, and what makes the inputs of its name of the global arrays."""


def programs_of(kind: str, layers: int) -> list[Program]:
    """Of a kind of scaling; those of weak scaling have so many layers."""
    if kind == "strong":
        return [Program(RING, "both", 1)]
    stacks = [Program(name, kind, layers) for name in (RING, ONE_RANK) for kind in KINDS]
    return stacks + [Program(RING, kind, 1) for kind in KINDS]


def mesh_of(devices: int) -> Mesh:
    """The first ones."""
    return jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])


def inputs_of(program: Program, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a program, from those of a layer forward and backward; or their types."""
    if program.kind == "forward":
        return _stack.forward_inputs(inputs[:-1], program.layers)
    return inputs


def build(
    program: Program, shape: RingShape, mesh: Mesh, implementation: str | None
) -> Compiled | str:
    """Compiled, or the reason why not."""
    try:
        layer = layer_of(shape, mesh, program.name, implementation)
        if program.kind == "forward":
            function = _stack.forward_of(layer.forward, program.layers)
        else:
            function = _stack.both_of(layer.both, program.layers)
        types = inputs_of(program, layer.types)
        return jax.jit(function).lower(*types).compile(), layer.inputs
    except Exception as error:  # the other points go on
        return reason_of(error)


def measured(
    point: Point,
    built: dict[Program, Compiled | str],
    shape: RingShape,
    mesh: Mesh,
    seconds: float,
) -> Point:
    """The point with its times, taken in turns, or with the reason why there are none."""
    try:
        if reasons := [x for x in built.values() if isinstance(x, str)]:
            raise RuntimeError(reasons[0])
        compiled = {key: x for key, x in built.items() if not isinstance(x, str)}
        whole = arrays(shape, mesh)
        makers = {key.name: make for key, (_, make) in compiled.items()}
        inputs = {name: make(*whole) for name, make in makers.items()}
        programs = {
            key: (program, inputs_of(key, inputs[key.name]))
            for key, (program, _) in compiled.items()
        }
        times, raised = in_turns(programs, rounds=7, seconds=seconds)
        for error in raised.values():
            raise error
    except Exception as error:  # out of memory, say; the others go on
        return dataclasses.replace(point, reason=reason_of(error))
    return dataclasses.replace(point, **figures(point.layers, times))


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
    counts = counts[1:] if kind == "weak" else counts
    jobs = []
    for n in counts:
        whole = dataclasses.replace(shape, length=A_GPU * n) if kind == "weak" else shape
        jobs.append((shorter(whole, 128) if arguments.quick else whole, mesh_of(n)))
    programs = programs_of(kind, 2 if arguments.quick else 8)
    with ThreadPoolExecutor(len(jobs) * len(programs)) as pool:
        built = [
            {
                program: pool.submit(build, program, whole, mesh, arguments.implementation)
                for program in programs
            }
            for whole, mesh in jobs
        ]
    for _, mesh in jobs:
        connect(mesh)
    hold(arguments.lock, range(most))
    return [
        measured(
            Point(kind, shape.name, mesh.size, programs[0].layers),
            {program: future.result() for program, future in futures.items()},
            whole,
            mesh,
            0.001 if arguments.quick else 0.06,
        )
        for (whole, mesh), futures in zip(jobs, built, strict=True)
    ]


def main() -> None:
    """Times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--devices", type=int, help="at most; default: all that are here")
    parser.add_argument("--implementation", help="of ours; default: the best for the device")
    parser.add_argument("--quick", action="store_true", help="sequences a 128th as long: a trial")
    parser.add_argument("--output", type=Path, help="JSON to write; default: benchmarks/results/")
    parser.add_argument("--table", type=Path, help="only print an earlier JSON as Markdown")
    parser.add_argument("--lock", type=Path, help="folder of locks, one for each GPU")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join(_scaling_report.tables(read(arguments.table))))
        return
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
            entries.append(dataclasses.asdict(point) | efficiencies(point, points))
            print({name: x for name, x in entries[-1].items() if x is not None}, flush=True)
        # After each, so that a run that is cut off leaves something.
        write(output, {"machine": where, "points": entries})
    _scaling_report.chart(output)
    print(f"wrote {output} and its picture")


if __name__ == "__main__":
    main()
