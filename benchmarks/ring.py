"""Times the ring on the GPUs that are here: ``python -m benchmarks.ring``.

Milliseconds forward and forward+backward, the contenders in turns, each with its ratio to the
ring's, round by round, of:

* ring: our per-shard functions inside `jax.shard_map`;
* one rank: one GPU that does the work of the ring's busiest device with the keys before it already
  in its memory; its ratio is the ring's efficiency;
* all-gather + ours, all-gather + cuDNN, all-to-all + cuDNN: what JAX offers without a ring;
* original (copied): the PyTorch original on two H200, not run here.

Then the memory of a device against the formula of `benchmarks._ring_memory`; JSON and a chart.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from benchmarks import _one_rank, _ring_memory, _ring_report
from benchmarks._exchanges import AXIS, OVER_MESH
from benchmarks._gpus import clocks, connect, hold, share_machine
from benchmarks._results import RESULTS, path_in, write
from benchmarks._ring_report import KINDS, ONE_RANK, RING, Row
from benchmarks._ring_shapes import SHAPES, RingShape
from benchmarks._timing import in_turns, median_of
from benchmarks.attention import difference, machine, reason_of

NAMES = (RING, ONE_RANK, *list(OVER_MESH)[1:])


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's forward pass, and with its backward pass, as functions to compile.

    Attributes:
        types: of the inputs of ``both``; ``forward`` takes all but the last, the cotangent.
        inputs: makes them of the global arrays.
    """

    forward: Callable[..., Any]
    both: Callable[..., Any]
    types: tuple[Any, ...]
    inputs: Callable[..., tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Built:
    """Compiled programs, and what makes their inputs of the global arrays."""

    forward: Any
    both: Any
    inputs: Callable[..., tuple[Any, ...]]


def specs(shape: RingShape, mesh: Mesh) -> tuple[Any, ...]:
    """Types of the global query, key, value, cu_seqlens and the cotangent."""

    def heads(count):
        dims = (shape.batch, shape.length, count, shape.dim)
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, P(None, AXIS)))

    ends = None
    if shape.documents:
        replicated = NamedSharding(mesh, P())
        ends = jax.ShapeDtypeStruct(shape.ends().shape, jnp.int32, sharding=replicated)
    query, key = heads(shape.heads), heads(shape.kv_heads)
    return query, key, key, ends, query


def arrays(shape: RingShape, mesh: Mesh) -> tuple[Any, ...]:
    """Random ones of these types."""

    def random(seed, spec):
        make = partial(jax.random.normal, shape=spec.shape, dtype=spec.dtype)
        return jax.jit(make, out_shardings=spec.sharding)(seed)

    seeds = jax.random.split(jax.random.key(0), 4)
    query, key, value, ends, dout = specs(shape, mesh)
    made = [random(s, x) for s, x in zip(seeds, (query, key, value, dout), strict=True)]
    if ends is not None:
        ends = jax.device_put(shape.ends(), ends.sharding)
    return *made[:3], ends, made[3]


def layer_over_mesh(shape: RingShape, mesh: Mesh, name: str, implementation: str | None) -> Layer:
    """A contender that works on the devices' parts of the global arrays."""
    spec = P(None, AXIS)
    attend = jax.shard_map(
        OVER_MESH[name](shape, mesh.size, implementation),
        mesh=mesh,
        in_specs=(spec, spec, spec, P()),
        out_specs=spec,
        check_vma=False,  # cuDNN's primitives know nothing of it
    )

    def both(query, key, value, ends, dout):
        def from_arrays(query, key, value):
            return attend(query, key, value, ends)

        out, pull = jax.vjp(from_arrays, query, key, value)
        return out, pull(dout)

    return Layer(attend, both, specs(shape, mesh), lambda *inputs: inputs)


def layer_of_one_rank(shape: RingShape, mesh: Mesh, implementation: str | None) -> Layer:
    """The work of the busiest device, on the first one."""
    first = mesh.devices.flat[0]
    forward, both = _one_rank.programs(shape, mesh.size, implementation)
    cut = _one_rank.inputs(shape, mesh.size)
    here = SingleDeviceSharding(first)
    types = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        jax.eval_shape(cut, *specs(shape, mesh)),
    )

    def inputs(*whole):
        copies = jax.jit(cut, out_shardings=NamedSharding(mesh, P()))(*whole)
        return jax.tree.map(lambda x: x.addressable_data(0), copies)

    return Layer(forward, both, types, inputs)


def layer_of(shape: RingShape, mesh: Mesh, name: str, implementation: str | None) -> Layer:
    """Of a contender, or one rank's."""
    if name == ONE_RANK:
        return layer_of_one_rank(shape, mesh, implementation)
    return layer_over_mesh(shape, mesh, name, implementation)


def build(shape: RingShape, mesh: Mesh, name: str, implementation: str | None) -> Built | str:
    """Compiled, or the reason why not."""
    try:
        layer = layer_of(shape, mesh, name, implementation)
        return Built(
            jax.jit(layer.forward).lower(*layer.types[:-1]).compile(),
            jax.jit(layer.both).lower(*layer.types).compile(),
            layer.inputs,
        )
    except Exception as error:  # a peer may fail in any way; the table says how
        return reason_of(error)


def memory(shape: RingShape, devices: int, built: Built) -> dict[str, Any]:
    """(what the compiler says, the formula's) of both programs."""
    return {
        kind: (
            _ring_memory.of_program(program),
            _ring_memory.by_formula(shape, devices, backward=kind == "both"),
        )
        for kind, program in (("forward", built.forward), ("both", built.both))
    }


def check(
    shape: RingShape, mesh: Mesh, built: dict[str, Any], inputs: dict[str, tuple[Any, ...]]
) -> Iterator[tuple[str, str]]:
    """(name, reason) of those that fail, or are off the ring."""
    expected = None
    for name, mine in inputs.items():
        try:
            results = built[name].both(*mine)
            expected = results if name == RING else expected
            if (
                expected is not None
                and not (far := off(shape, mesh, name, results, expected)) <= 0.03
            ):
                yield name, f"wrong: off the ring by {far:.2g}"  # NaN too
        except Exception as error:  # a peer may fail in any way; the table says how
            yield name, reason_of(error)


def measure(
    shape: RingShape, mesh: Mesh, built: dict[str, Any], rounds: int, seconds: float
) -> list[Row]:
    """Times what was compiled, in turns."""
    reasons = {name: x for name, x in built.items() if isinstance(x, str)}
    whole = arrays(shape, mesh)
    inputs = {name: x.inputs(*whole) for name, x in built.items() if name not in reasons}
    reasons |= dict(check(shape, mesh, built, inputs))
    programs = {}
    for name, mine in inputs.items():
        if name not in reasons:
            programs[name, "forward"] = built[name].forward, mine[:-1]
            programs[name, "both"] = built[name].both, mine
    times, raised = in_turns(programs, rounds=rounds, seconds=seconds)
    reasons |= {name: reason_of(error) for (name, _), error in raised.items()}
    rows = []
    for name, x in built.items():
        found = {kind: times[name, kind] for kind in KINDS if (name, kind) in times}
        forward, both = (median_of(found.get(kind)) for kind in KINDS)
        saved = memory(shape, mesh.size, x) if name == RING and isinstance(x, Built) else {}
        rows.append(Row(shape.name, name, forward, both, reasons.get(name), saved, found))
    return rows


def off(shape: RingShape, mesh: Mesh, name: str, results, expected) -> float:
    """The largest relative norm of a difference; of one rank, in its output and dquery."""
    if name != ONE_RANK:
        return difference(results, expected)
    first = mesh.devices.flat[0]
    out, (dquery, *_) = expected
    whole = [jax.device_put(_one_rank.part(shape, mesh.size, x), first) for x in (out, dquery)]
    return difference([results[0], results[1][0]], whole)


def compare(
    shapes: list[RingShape], names: list[str], mesh: Mesh, arguments: argparse.Namespace
) -> Iterator[list[Row]]:
    """Compiles a shape's contenders, times them in turns and prints its table."""
    connect(mesh)
    for shape in shapes:
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(names)) as pool:
            futures = {
                name: pool.submit(build, shape, mesh, name, arguments.implementation)
                for name in names
            }
            built = {name: future.result() for name, future in futures.items()}
        print(f"compiled {len(names)} contenders in {time.perf_counter() - begin:.0f} s")
        hold(arguments.lock, range(mesh.size))
        seconds = 0.001 if arguments.quick else 0.06
        found = measure(shape, mesh, built, arguments.rounds, seconds)
        if (copied := _ring_report.original(shape, mesh.size)) is not None:
            found.append(copied)
        print(_ring_report.table(shape, mesh.size, found), flush=True)
        yield found


def main() -> None:
    """Compiles, times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--only", nargs="+", choices=NAMES[1:], help="beside the ring; default: all"
    )
    parser.add_argument("--devices", type=int, help="how many; default: all GPUs, or 2 CPU devices")
    parser.add_argument("--implementation", help="of ours; default: the best for the device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a smoke test")
    parser.add_argument(
        "--output", type=Path, help="JSON to write; default, for a whole run: benchmarks/results/"
    )
    parser.add_argument("--lock", type=Path, help="folder of locks, one for each GPU")
    arguments = parser.parse_args()
    share_machine()
    jax.config.update("jax_num_cpu_devices", arguments.devices or 2)
    devices = arguments.devices or jax.device_count()
    if devices < 2 or devices > jax.device_count():
        parser.error(f"a ring of {devices} devices, but there are {jax.device_count()}")
    if jax.default_backend() == "cpu" and not arguments.quick:
        parser.error("on a CPU there is only --quick")

    shapes = [SHAPES[name] for name in arguments.shapes]
    if arguments.quick:
        shapes = [shape.tiny() for shape in shapes]
    names = [name for name in NAMES if name == RING or name in (arguments.only or NAMES)]
    mesh = jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])
    where = machine() | {"devices": devices}
    print(where, flush=True)
    output = arguments.output
    if output is None and not arguments.quick and not arguments.only and len(shapes) == len(SHAPES):
        output = path_in(RESULTS, "ring", where)
    entries = []
    for shape, found in zip(shapes, compare(shapes, names, mesh, arguments), strict=True):
        entries.append(_ring_report.entry(shape, devices, found) | {"clocks": clocks()})
        if output is not None:  # after each, so that a run that is cut off leaves something
            write(output, _ring_report.document(where, entries))
    if output is not None:
        _ring_report.chart(output)
        print(f"\nwrote {output} and its picture")


if __name__ == "__main__":
    main()
