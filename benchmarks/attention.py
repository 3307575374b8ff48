"""Times our kernels beside the peers that are installed: ``python -m benchmarks.attention``.

Prints milliseconds and useful TFLOP/s (attended pairs only), forward and forward+backward, and
the ratio to the best peer; writes JSON and a chart. Peers: cuDNN through ``jax.nn``,
FlashAttention-3 (``flash_attn3_jax``), tokamax and torch's flex_attention.
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _processes, _report
from benchmarks._peers import CONTENDERS, Contender
from benchmarks._report import Row
from benchmarks._shapes import ALL, Shape
from benchmarks._timing import calls_within, median_seconds

TORCH = "torch-flex"
IMPORTS = threading.Lock()
"""Peers are imported when built: two threads at once fell into a deadlock among their modules."""


def specs(shape: Shape) -> tuple[Any, ...]:
    """Types of query, key, value, cu_seqlens and the cotangent."""

    def heads(count, dim):
        return jax.ShapeDtypeStruct((shape.batch, shape.length, count, dim), jnp.bfloat16)

    ends = None
    if shape.documents:
        ends = jax.ShapeDtypeStruct((len(shape.documents) + 1,), jnp.int32)
    query, key = heads(shape.heads, shape.dim), heads(shape.kv_heads, shape.dim)
    value, out = (heads(n, shape.dim_of_values) for n in (shape.kv_heads, shape.heads))
    return query, key, value, ends, out


def arrays(shape: Shape) -> tuple[Any, ...]:
    """Random ones of these types."""
    keys = jax.random.split(jax.random.key(0), 5)
    query, key, value, ends, dout = (
        None if x is None else jax.random.normal(seed, x.shape, jnp.bfloat16)
        for seed, x in zip(keys, specs(shape), strict=True)
    )
    if ends is not None:
        ends = jnp.array(np.cumsum([0, *shape.documents]), jnp.int32)
    return query, key, value, ends, dout


def reason_of(error: Exception) -> str:
    """One line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def build(shape: Shape, contender: Contender):
    """(forward, forward and backward) as compiled programs, or the reason why there is none."""
    try:
        with IMPORTS:
            attend = contender.build(shape)

        def both(query, key, value, ends, dout):
            def from_arrays(query, key, value):
                return attend(query, key, value, ends)

            out, pull = jax.vjp(from_arrays, query, key, value)
            return out, pull(dout)

        *inputs, dout = specs(shape)
        options = contender.options or None
        return (
            jax.jit(attend).lower(*inputs).compile(),
            jax.jit(both).lower(*inputs, dout).compile(compiler_options=options),
        )
    except Exception as error:  # a peer may fail in any way; the table says how
        return reason_of(error)


def difference(results, expected) -> float:
    """The largest relative norm of a difference among output and gradients."""

    def relative(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())

    return max(map(float, jax.tree.leaves(jax.tree.map(jax.jit(relative), results, expected))))


def measure(shape: Shape, built: dict[str, Any], inputs: tuple[Any, ...], repeats: int):
    """Times what was compiled: a row for each name.

    All take turns, every time in another order: a GPU's clock depends on what it has just done.
    """
    arguments = inputs[:-1], inputs
    reasons: dict[str, str] = {}
    calls: dict[tuple[str, int], int] = {}
    expected = None
    for name, programs in built.items():
        if isinstance(programs, str):
            reasons[name] = programs
            continue
        try:
            for phase, args in enumerate(arguments):
                calls[name, phase] = calls_within(0.1, programs[phase], *args)
            results = programs[1](*inputs)
            if expected is None:
                expected = results
            elif (far := difference(results, expected)) > 0.03:
                reasons[name] = f"wrong: off the first implementation by {far:.2g}"
                del calls[name, 0], calls[name, 1]
            del results
        except Exception as error:  # a peer may fail in any way; the table says how
            reasons[name] = reason_of(error)
    del expected
    times: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    order = random.Random(0)
    for _ in range(repeats):
        for name, phase in order.sample(list(calls), len(calls)):
            program, args = built[name][phase], arguments[phase]
            try:
                seconds = median_seconds(program, *args, calls=calls[name, phase], repeats=1)
                times[name, phase].append(seconds)
            except Exception as error:  # as above
                reasons[name] = reason_of(error)
                del calls[name, phase]

    def row(name):
        forward, both = (
            statistics.median(times[name, phase]) if (name, phase) in calls else None
            for phase in range(2)
        )
        return Row(shape.name, name, CONTENDERS[name].ours, forward, both, reasons.get(name))

    return [row(name) for name in built]


class TorchPeer:
    """torch's flex_attention on some shapes, compiling in a process of its own from now on."""

    def __init__(self, shapes: list[Shape], repeats: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._torch", str(repeats), *(x.name for x in shapes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def read(self) -> str:
        """A line of what it says; empty once it is gone."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def measure(self, shape: Shape) -> Row:
        """Lets it time one shape."""
        assert self.process.stdin is not None
        try:
            print(shape.name, file=self.process.stdin, flush=True)
            answer = json.loads(self.read())
        except (BrokenPipeError, json.JSONDecodeError):
            answer = {"reason": f"torch's process exited with {self.process.wait()}"}
        return Row(shape.name, TORCH, False, **answer)


def device_rates() -> dict[str, float]:
    """What the device reaches: a large matrix product, and a copy."""
    matrix = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = median_seconds(jax.jit(lambda x: x @ x), matrix)
    long = jnp.zeros(2**28, jnp.float32)
    copy = median_seconds(jax.jit(lambda x: x + 1), long)
    return {"matmul_tflops": 2 * 8192**3 / product / 1e12, "copy_tbps": 2 * 2**30 / copy / 1e12}


def machine() -> dict[str, Any]:
    """Device and versions."""
    versions = {"jax": jax.__version__}
    for name in ("flash_attn3_jax", "tokamax", "torch"):
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    return {"device": jax.devices()[0].device_kind} | versions


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Keeps other processes that hold the same lock from using the GPU meanwhile."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compare(
    shapes: list[Shape], names: list[str], repeats: int, lock: Path | None
) -> Iterator[list[Row]]:
    """Compiles all, then times one shape after the other."""
    torch = None
    if TORCH in names and importlib.util.find_spec("torch") is not None:
        torch = TorchPeer(shapes, repeats)
    jobs = [(shape, name) for shape in shapes for name in names if name != TORCH]
    with ThreadPoolExecutor(16) as pool:
        futures = {job: pool.submit(build, job[0], CONTENDERS[job[1]]) for job in jobs}
    if torch is not None:
        torch.read()
    for shape in shapes:
        built = {name: futures.pop((shape, name)).result() for name in names if name != TORCH}
        with alone(lock):
            found = measure(shape, built, arrays(shape), repeats)
        del built
        if torch is not None:
            found.append(torch.measure(shape))
        elif TORCH in names:
            found.append(Row(shape.name, TORCH, False, reason="torch is not installed"))
        yield found


def main() -> None:
    """Exits with 1 if something got slower than in the JSON of --compare."""
    everyone = [*CONTENDERS, TORCH]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(ALL), default=list(ALL))
    parser.add_argument("--only", nargs="+", choices=everyone, help="default: all")
    parser.add_argument(
        "--deterministic", action="store_true", help="add the peers' deterministic backward passes"
    )
    parser.add_argument("--quick", action="store_true", help="two repeats instead of five")
    parser.add_argument(
        "--output", type=Path, help="JSON to write; default, for a whole run: benchmarks/results/"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="that compile, a shape each; timings take turns"
    )
    parser.add_argument("--lock", type=Path, help="file that processes lock while they time")
    parser.add_argument("--compare", type=Path, help="an earlier JSON on the same device")
    arguments = parser.parse_args()
    names = arguments.only or [
        name
        for name in everyone
        if name == TORCH or arguments.deterministic or not CONTENDERS[name].deterministic
    ]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    where = machine()
    print(where, flush=True)
    with alone(arguments.lock):
        where |= device_rates()
    print(
        f"an 8192^3 matrix product: {where['matmul_tflops']:.0f} TFLOP/s, "
        f"a copy: {where['copy_tbps']:.2f} TB/s (read and written)"
    )
    whole = not arguments.only and not arguments.quick and arguments.shapes == list(ALL)
    output = arguments.output
    if output is None and whole:
        slug = "-".join(where["device"].lower().split())
        output = Path(__file__).parent / "results" / f"attention-{slug}.json"
    before = None if arguments.compare is None else _report.read(arguments.compare, where)
    rows: list[Row] = []
    shapes = [ALL[name] for name in arguments.shapes]
    if arguments.processes > 1:
        found_rows = _processes.rows_by_shape(arguments.shapes, names, arguments)
    else:
        found_rows = compare(shapes, names, 2 if arguments.quick else 5, arguments.lock)
    for found in found_rows:
        print(_report.table(found[0].shape, found), flush=True)
        rows += found
        if arguments.output is not None:  # so that a run that is cut off leaves something
            _report.write(arguments.output, where, rows)
    if output is not None:
        _report.write(output, where, rows)
        _report.chart(output, where, rows)
        print(f"\nwrote {output} and its picture")
    slower = [] if before is None else _report.slower(before, rows)
    if before is not None:
        print(f"\nslower than {arguments.compare}: {len(slower)}", *slower, sep="\n  ")
    sys.exit(bool(slower))


if __name__ == "__main__":
    main()
