"""Times our kernels beside the peers that are installed: ``python -m benchmarks.attention``.

Prints milliseconds and useful TFLOP/s (attended pairs only), forward and forward+backward, and
the ratio to the best peer; writes JSON and a chart. Peers: cuDNN through ``jax.nn``,
FlashAttention-3 (``flash_attn3_jax``), tokamax and torch's flex_attention.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _attention_tables, _report
from benchmarks._gpus import clocks, hold, share_machine
from benchmarks._peers import CONTENDERS, Contender
from benchmarks._report import KINDS, Row
from benchmarks._results import RESULTS, path_in, read, write
from benchmarks._shapes import ALL, Shape
from benchmarks._timing import in_turns, median_of, median_seconds

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


@jax.jit
def _relative(x, y):
    x, y = (z.astype(jnp.float32) for z in (x, y))
    return jnp.sqrt(jnp.square(x - y).sum() / jnp.square(y).sum())


def difference(results, expected) -> float:
    """The largest relative norm of a difference among output and gradients."""
    return max(map(float, jax.tree.leaves(jax.tree.map(_relative, results, expected))))


def check(built: dict[str, Any], inputs: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """(name, reason) of those that fail, or are off the first one of them."""
    expected = None
    for name, programs in built.items():
        if isinstance(programs, str):
            yield name, programs
            continue
        try:
            results = programs[1](*inputs)
            expected = results if expected is None else expected
            far = difference(results, expected)
            if not far <= 0.03:  # NaN too
                yield name, f"wrong: off the first implementation by {far:.2g}"
        except Exception as error:  # a peer may fail in any way; the table says how
            yield name, reason_of(error)


def checked_times(
    built: dict[str, Any], inputs: tuple[Any, ...], rounds: int, seconds: float
) -> tuple[dict[tuple[str, str], list[float]], dict[str, str]]:
    """Times what was compiled, in turns: {(name, kind): seconds}, {name: why there are none}."""
    reasons = dict(check(built, inputs))
    programs = {
        (name, kind): (program, args)
        for name in built
        if name not in reasons
        for kind, program, args in zip(KINDS, built[name], (inputs[:-1], inputs), strict=True)
    }
    times, raised = in_turns(programs, rounds=rounds, seconds=seconds)
    return times, reasons | {name: reason_of(error) for (name, _), error in raised.items()}


def measure(
    shape: Shape, built: dict[str, Any], inputs: tuple[Any, ...], rounds: int, seconds: float
) -> list[Row]:
    """A row for each name of what was compiled."""
    times, reasons = checked_times(built, inputs, rounds, seconds)

    def row(name):
        found = {kind: times[name, kind] for kind in KINDS if (name, kind) in times}
        forward, both = (median_of(found.get(kind)) for kind in KINDS)
        ours, reason = CONTENDERS[name].ours, reasons.get(name)
        return Row(shape, name, ours, forward, both, reason, found)

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
        return Row(shape, TORCH, False, **answer)


def device_rates() -> Callable[[], dict[str, float]]:
    """Compiled: what the device reaches in a large matrix product, and in a copy."""
    matrix, long = (
        jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16),
        jax.ShapeDtypeStruct((2**28,), jnp.float32),
    )
    normal = jax.jit(partial(jax.random.normal, shape=matrix.shape, dtype=matrix.dtype))
    random = normal.lower(jax.random.key(0)).compile()
    product = jax.jit(lambda x: x @ x).lower(matrix).compile()
    copy = jax.jit(lambda x: x + 1).lower(long).compile()

    def rates():
        seconds = median_seconds(product, random(jax.random.key(0)))
        copied = median_seconds(copy, jnp.zeros(long.shape, long.dtype))
        return {
            "matmul_tflops": 2 * 8192**3 / seconds / 1e12,
            "copy_tbps": 2 * 2**30 / copied / 1e12,
        }

    return rates


def machine() -> dict[str, Any]:
    """Device, versions and day."""
    versions = {"jax": jax.__version__, "date": datetime.date.today().isoformat()}
    for name in ("flash_attn3_jax", "tokamax", "torch"):
        if importlib.util.find_spec(name) is not None:
            versions[name] = importlib.metadata.version(name)
    return {"device": jax.devices()[0].device_kind} | versions


def compare(
    shapes: list[Shape], names: list[str], *, rounds: int, seconds: float, lock: Path | None
) -> Iterator[list[Row]]:
    """Compiles all, waits for the GPU, then times one shape after the other."""
    torch = None
    if TORCH in names and importlib.util.find_spec("torch") is not None:
        torch = TorchPeer(shapes, rounds)
    jobs = [(shape, name) for shape in shapes for name in names if name != TORCH]
    with ThreadPoolExecutor(16) as pool:
        futures = {job: pool.submit(build, job[0], CONTENDERS[job[1]]) for job in jobs}
        inputs = {
            shape: pool.submit(jax.jit(partial(arrays, shape)).lower().compile) for shape in shapes
        }
    if torch is not None:
        torch.read()
    hold(lock, range(1))
    for shape in shapes:
        built = {name: futures.pop((shape, name)).result() for name in names if name != TORCH}
        found = measure(shape, built, inputs.pop(shape).result()(), rounds, seconds)
        del built
        if torch is not None:
            found.append(torch.measure(shape))
        elif TORCH in names:
            found.append(Row(shape, TORCH, False, reason="torch is not installed"))
        yield found


def main() -> None:
    """Exits with 1 if something got slower than in the JSON of --compare."""
    everyone = [*CONTENDERS, TORCH]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(ALL), default=list(ALL))
    parser.add_argument("--only", nargs="+", choices=everyone, help="default: the usual ones")
    parser.add_argument(
        "--deterministic", action="store_true", help="add the peers' deterministic backward passes"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a smoke test")
    parser.add_argument(
        "--output", type=Path, help="JSON to write; default, for a whole run: benchmarks/results/"
    )
    parser.add_argument("--table", type=Path, help="only print an earlier JSON as Markdown")
    parser.add_argument("--lock", type=Path, help="folder of locks, one for each GPU")
    parser.add_argument("--compare", type=Path, help="an earlier JSON on the same device")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n\n".join(_attention_tables.tables(read(arguments.table)["rows"])))
        return
    usual = [
        name
        for name, x in CONTENDERS.items()
        if not x.special and (arguments.deterministic or not x.deterministic)
    ]
    names = arguments.only or [*usual, TORCH]
    share_machine()  # torch needs memory too
    where, rates = machine(), device_rates()
    print(where, flush=True)
    whole = not arguments.only and not arguments.quick and arguments.shapes == list(ALL)
    output = arguments.output
    if output is None and whole:
        output = path_in(RESULTS, "attention", where)
    before = None if arguments.compare is None else _report.read(arguments.compare, where)
    rows: list[Row] = []
    readings: dict[str, Any] = {}
    shapes = [ALL[name] for name in arguments.shapes]
    shapes = [shape.tiny() for shape in shapes] if arguments.quick else shapes
    settings = {"rounds": arguments.rounds, "seconds": 0.001 if arguments.quick else 0.05}
    for found in compare(shapes, names, **settings, lock=arguments.lock):
        if not rows and not arguments.quick:  # nobody else is on the GPU by now
            where |= rates()
        print(_report.table(found), flush=True)
        rows += found
        readings[found[0].shape.name] = clocks()
        if output is not None:  # after each, so that a run that is cut off leaves something
            write(output, _report.document(where, rows, readings))
    if output is not None:
        _report.chart(output)
        print(f"\nwrote {output} and its picture")
    slower = [] if before is None else _report.slower(before, rows)
    if before is not None:
        print(f"\nslower than {arguments.compare}: {len(slower)}", *slower, sep="\n  ")
    sys.exit(bool(slower))


if __name__ == "__main__":
    main()
