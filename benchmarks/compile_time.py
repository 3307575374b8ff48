"""CPU seconds to trace and compile the gradient of layers: ``python -m benchmarks.compile_time``.

Of one layer and of four unrolled ones, float32, their sequence cut over four CPU devices, ours
beside `jax.nn.dot_product_attention`, which XLA distributes. Each figure is the median of fresh
processes, in which the contenders take turns, and counts the CPU time of all threads.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_swa_jax import ring_attention

DEVICES, LENGTH, WINDOWS = 4, 4096, (255, 1023, None)
HEADS, KV_HEADS, DIM, FEATURES = 8, 2, 32, 256
STEPS = ("trace", "lower", "compile")


def dense(q, k, v, window: int | None):
    """The window in a layer of JAX's own."""
    local = None if window is None else (window, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)


def ours(q, k, v, window: int | None):
    """The same window, by the exchange that None takes: "halo"; without a window "all_to_all"."""
    return ring_attention(q, k, v, window_size=window)


CONTENDERS = {"dense": dense, "ours": ours}


def seconds_of(name: str, window: int | None, layers: int) -> dict[str, float]:
    """CPU seconds of each step, in this process, which has compiled nothing before."""
    attend = partial(CONTENDERS[name], window=window)
    mesh = jax.make_mesh((DEVICES,), ("seq",), (AxisType.Auto,))

    def loss(weights, x):
        for query, key, value, output in weights:
            q, k, v = (jnp.einsum("bse,enh->bsnh", x, w) for w in (query, key, value))
            x = x + jnp.einsum("bsnh,nhe->bse", attend(q, k, v), output)
        return (x**2).mean()

    def shape(*dims: int, spec: P):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec))

    projections = [shape(FEATURES, heads, DIM, spec=P()) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    weights = [(*projections, shape(HEADS, DIM, FEATURES, spec=P()))] * layers
    x = shape(1, LENGTH, FEATURES, spec=P(None, "seq"))
    with jax.set_mesh(mesh):
        marks = [time.process_time()]
        traced = jax.jit(jax.grad(loss)).trace(weights, x)
        marks.append(time.process_time())
        lowered = traced.lower()
        marks.append(time.process_time())
        lowered.compile()
        marks.append(time.process_time())
    return dict(zip(STEPS, (b - a for a, b in itertools.pairwise(marks)), strict=True))


def in_own_process(name: str, window: int | None, layers: int) -> dict[str, float]:
    """`seconds_of` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.compile_time"]
    command += ["--only", name, json.dumps(window), str(layers)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    return json.loads(done.stdout)


def rows_of(window: int | None, layers: int, repeats: int) -> list[dict[str, Any]]:
    """Median CPU seconds of each contender, and the median of its ratios to dense, turn by turn."""
    turns = [
        {name: in_own_process(name, window, layers) for name in CONTENDERS} for _ in range(repeats)
    ]
    rows = []
    for name in CONTENDERS:
        totals = [sum(turn[name].values()) for turn in turns]
        ratios = [x / sum(turn["dense"].values()) for x, turn in zip(totals, turns, strict=True)]
        row = {
            step: round(statistics.median(turn[name][step] for turn in turns), 2) for step in STEPS
        }
        row |= {"total": round(statistics.median(totals), 2)}
        row |= {"times_dense": round(statistics.median(ratios), 2)}
        rows.append({"name": name, "window": window, "layers": layers, **row})
    return rows


def main() -> None:
    """Prints a line a window, number of layers and contender, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 4])
    output = Path(__file__).parent / "results" / "compile-time-cpu.json"
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        jax.config.update("jax_num_cpu_devices", DEVICES)
        name, window, layers = arguments.only
        print(json.dumps(seconds_of(name, json.loads(window), int(layers))))
        return
    rows = []
    for window, layers in itertools.product(WINDOWS, arguments.layers):
        for row in rows_of(window, layers, arguments.repeats):
            rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
    machine = {
        "device": f"{os.cpu_count()} cores of {platform.machine()}",
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
