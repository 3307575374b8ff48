"""Times the ring on the GPUs that are here: ``python -m benchmarks.ring``.

Milliseconds forward and forward+backward, each with its ratio to the ring's, of:

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
from benchmarks._ring_report import ONE_RANK, RING, Row
from benchmarks._ring_shapes import SHAPES, RingShape
from benchmarks._timing import calls_within, median_seconds
from benchmarks.attention import difference, machine, reason_of

NAMES = (RING, ONE_RANK, *list(OVER_MESH)[1:])


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


def build_over_mesh(shape: RingShape, mesh: Mesh, name: str, implementation: str | None) -> Built:
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

    types = specs(shape, mesh)
    return Built(
        jax.jit(attend).lower(*types[:-1]).compile(),
        jax.jit(both).lower(*types).compile(),
        lambda *inputs: inputs,
    )


def build_one_rank(shape: RingShape, mesh: Mesh, implementation: str | None) -> Built:
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

    return Built(
        jax.jit(forward).lower(*types[:-1]).compile(),
        jax.jit(both).lower(*types).compile(),
        inputs,
    )


def build(shape: RingShape, mesh: Mesh, name: str, implementation: str | None) -> Built | str:
    """Compiled, or the reason why not."""
    try:
        if name == ONE_RANK:
            return build_one_rank(shape, mesh, implementation)
        return build_over_mesh(shape, mesh, name, implementation)
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


def measure(shape: RingShape, mesh: Mesh, name: str, built, inputs, repeats: int, expected):
    """(row, results): times, the results compared with the ring's where there are these."""
    if isinstance(built, str):
        return Row(shape.name, name, reason=built), None
    times: list[float] = []
    reason = results = None
    try:
        mine = built.inputs(*inputs)
        for program, args in ((built.forward, mine[:-1]), (built.both, mine)):
            calls = calls_within(0.06, program, *args)
            times.append(median_seconds(program, *args, calls=calls, repeats=repeats))
        results = built.both(*mine)
        if expected is not None:
            far = off(shape, mesh, name, results, expected)
            if not far <= 0.03:  # NaN too
                times = []
                reason = f"wrong: off the ring by {far:.2g}"
    except Exception as error:  # a peer may fail in any way; the table says how
        reason = reason_of(error)
    forward, both = [*times, None, None][:2]
    saved = memory(shape, mesh.size, built) if name == RING else {}
    return Row(shape.name, name, forward, both, reason, saved), results


def off(shape: RingShape, mesh: Mesh, name: str, results, expected) -> float:
    """The largest relative norm of a difference; of one rank, in its output and dquery."""
    if name != ONE_RANK:
        return difference(results, expected)
    first = mesh.devices.flat[0]
    out, (dquery, *_) = expected
    whole = [jax.device_put(_one_rank.part(shape, mesh.size, x), first) for x in (out, dquery)]
    return difference([results[0], results[1][0]], whole)


def compare(
    shapes: list[RingShape], names: list[str], mesh: Mesh, repeats: int, implementation: str | None
) -> Iterator[list[Row]]:
    """Compiles a shape's contenders, times one after the other and prints its table."""
    for shape in shapes:
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(names)) as pool:
            futures = {
                name: pool.submit(build, shape, mesh, name, implementation) for name in names
            }
        print(f"compiled {len(names)} contenders in {time.perf_counter() - begin:.0f} s")
        inputs, expected, results, found = arrays(shape, mesh), None, None, []
        for name in names:
            built = futures.pop(name).result()
            row, results = measure(shape, mesh, name, built, inputs, repeats, expected)
            expected = results if name == RING else expected
            found.append(row)
        del inputs, expected, results
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
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a smoke test")
    parser.add_argument(
        "--output", type=Path, help="JSON to write; default, for a whole run: benchmarks/results/"
    )
    arguments = parser.parse_args()
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
    repeats = 2 if arguments.quick else 5
    rows: list[Row] = []
    for found in compare(shapes, names, mesh, repeats, arguments.implementation):
        rows += found
        if arguments.output is not None:  # so that a run that is cut off leaves something
            done = shapes[: len({row.shape for row in rows})]
            _ring_report.write(arguments.output, where, done, rows)
    output = arguments.output
    if output is None and not arguments.quick and not arguments.only and len(shapes) == len(SHAPES):
        slug = "-".join(where["device"].lower().split())
        output = Path(__file__).parent / "results" / f"ring-{devices}x-{slug}.json"
        _ring_report.write(output, where, shapes, rows)


if __name__ == "__main__":
    main()
