"""Times decoding steps beside cuDNN: ``python -m benchmarks.decoding``.

Each row is a ``lax.scan`` of steps, whose cache goes from one to the next. With one new token the
peer is cuDNN with one query over as many keys, which never change: what reading them costs. With
many, a row has its useful TFLOP/s (attended pairs only). Prints a table and writes JSON.
"""

import argparse
import dataclasses
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import ring_swa_jax
from benchmarks import _markdown
from benchmarks._gpus import hold, share_machine
from benchmarks._results import Document, read, write
from benchmarks._timing import in_turns
from benchmarks.attention import machine, reason_of


@dataclasses.dataclass(frozen=True)
class Step:
    """A decoding step in bfloat16, of a layer with a full cache."""

    name: str
    batch: int
    window: int
    tokens: int = 1
    sinks: int = 0
    learned: bool = False
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def flops(self) -> float:
        """Of the two products over attended pairs."""
        pairs = self.tokens * (self.window + 1 + self.sinks)
        return 4.0 * self.batch * pairs * self.heads * self.dim

    def bytes(self) -> float:
        """Of the keys and values that one step reads."""
        return 4.0 * self.batch * (self.window + 1 + self.sinks) * self.kv_heads * self.dim

    def rate(self, microseconds: float) -> str:
        """What a time means: of one token keys and values read, of many useful FLOPs."""
        if self.tokens > 1:
            return f"{self.flops() / microseconds / 1e6:.0f} TFLOP/s"
        return f"{self.bytes() / microseconds / 1e6:.2f} TB/s"


STEPS = (
    Step("one-16", 16, 1023),
    Step("one-64", 64, 4095),
    Step("one-1", 1, 1023),
    Step("one-1-sinks", 1, 1023, sinks=4),
    Step("one-16-sinks", 16, 1023, sinks=4),
    Step("one-16-gptoss", 16, 127, learned=True, heads=64, dim=64),
    Step("chunk-64", 1, 4095, 64),
    Step("chunk-512", 1, 4095, 512),
    Step("chunk-512-batch", 4, 4095, 512),
    Step("chunk-512-sinks", 1, 4095, 512, sinks=4),
)


def arrays(step: Step) -> tuple[Any, ...]:
    """Random query, keys and values of new tokens, and a full cache."""
    keys = jax.random.split(jax.random.key(0), 5)

    def normal(key, tokens, heads):
        return jax.random.normal(key, (step.batch, tokens, heads, step.dim), jnp.bfloat16)

    heads = step.heads, step.kv_heads, step.kv_heads
    new = (normal(key, step.tokens, n) for key, n in zip(keys[:3], heads, strict=True))
    prompt = (normal(key, step.window + 1 + step.sinks, step.kv_heads) for key in keys[3:])
    cache = ring_swa_jax.prefill_cache(*prompt, window_size=step.window, num_sink_tokens=step.sinks)
    return *new, cache


def ours(step: Step, implementation: str | None, count: int):
    """``count`` steps, and the cache after them."""
    sink_logits = jnp.zeros(step.heads) if step.learned else None

    def run(query, key, value, cache):
        def one(carry, _):
            cache, query = carry
            out, cache = ring_swa_jax.decode_attention(
                query, key, value, cache, window_size=step.window, num_sink_tokens=step.sinks,
                sink_logits=sink_logits, implementation=implementation,
            )  # fmt: skip
            return (cache, out), None

        return lax.scan(one, (cache, query), None, length=count)[0]

    return run


def cudnn(step: Step, count: int):
    """As many queries over as many keys by cuDNN, with slots first, as it takes them."""

    def run(query, key, value, cache):
        keys = (x.swapaxes(1, 2) for x in (cache.key, cache.value))
        keys, values = lax.optimization_barrier(tuple(keys))

        def one(query, _):
            out = jax.nn.dot_product_attention(query, keys, values, implementation="cudnn")
            return out, None

        return lax.scan(one, query, None, length=count)[0]

    return run


def build(step: Step, count: int) -> tuple[Any, dict[str, Any]]:
    """What makes the inputs, and each contender compiled, or the reason why not."""
    make = jax.jit(partial(arrays, step))
    inputs = jax.eval_shape(make)
    builders = {
        "ours": ours(step, None, count),
        "xla": ours(step, "xla", count),
        "cudnn": cudnn(step, count),
    }

    def compiled(function):
        try:
            return jax.jit(function).lower(*inputs).compile()
        except Exception as error:  # a peer may fail in any way; the table says how
            return reason_of(error)

    programs = {name: compiled(function) for name, function in builders.items()}
    return make.lower().compile(), programs


def measure(
    inputs: tuple[Any, ...], built: dict[str, Any], count: int, rounds: int
) -> dict[str, float | str]:
    """Microseconds of a step by each contender, which take turns; a reason where one failed."""
    found = {name: x for name, x in built.items() if isinstance(x, str)}
    programs = {name: (x, inputs) for name, x in built.items() if name not in found}
    times, raised = in_turns(programs, rounds=rounds, seconds=0.1)
    medians = {name: 1e6 * statistics.median(x) / count for name, x in times.items()}
    return found | {name: reason_of(error) for name, error in raised.items()} | medians


def line(step: Step, found: dict[str, float | str]) -> str:
    """One line of the table."""
    cells = [f"{step.name:16s}"]
    for name, time in found.items():
        if isinstance(time, str):
            cells.append(f"{name}: {time[:60]}")
            continue
        cells.append(f"{name} {time:8.1f} us {step.rate(time)}")
    return "  ".join(cells)


def table(document: Document) -> str:
    """For a page, in Markdown; the fastest in bold."""
    head = ["batch, new tokens, heads, head size, window_size", "ours", '"xla"', "cuDNN"]
    lines = []
    found = document["microseconds"]
    for step in (x for x in STEPS if x.name in found):
        times = [found[step.name][name] for name in ("ours", "xla", "cudnn")]
        cells = [x if isinstance(x, str) else f"{x:.1f}; {step.rate(x)}" for x in times]
        least = min((x for x in times if not isinstance(x, str)), default=None)
        cells = [f"**{x}**" if t == least else x for x, t in zip(cells, times, strict=True)]
        label = f"{step.batch}, {step.tokens}, {step.heads}/{step.kv_heads}, {step.dim}, "
        label += str(step.window) + (f"; {step.sinks} sink tokens" if step.sinks else "")
        lines.append([label + ("; learned sinks" if step.learned else ""), *cells])
    return _markdown.table(head, lines)


def main() -> None:
    """Prints each row when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", choices=[x.name for x in STEPS])
    parser.add_argument("--count", type=int, default=64, help="steps of a scan")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few steps: a smoke test")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--table", type=Path, help="only print an earlier JSON as Markdown")
    parser.add_argument("--lock", type=Path, help="folder of locks, one for each GPU")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read(arguments.table)))
        return
    share_machine()
    count, rounds = (2, 1) if arguments.quick else (arguments.count, arguments.repeats)
    steps = [x for x in STEPS if arguments.steps is None or x.name in arguments.steps]
    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(lambda step: build(step, count), steps))
    hold(arguments.lock, range(1))
    results = {}
    for step, (make, programs) in zip(steps, built, strict=True):
        results[step.name] = measure(make(), programs, count, rounds)
        print(line(step, results[step.name]), flush=True)
        if arguments.output is not None:
            write(arguments.output, {"machine": machine(), "microseconds": results})


if __name__ == "__main__":
    main()
