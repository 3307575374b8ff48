"""Times decoding steps beside cuDNN: ``python -m benchmarks.decoding``.

Each row is a ``lax.scan`` of steps, whose cache goes from one to the next. With one new token the
peer is cuDNN with one query over as many keys, which never change: what reading them costs. With
many, a row has its useful TFLOP/s (attended pairs only). Prints a table and writes JSON.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import ring_swa_jax
from benchmarks._timing import calls_within, median_seconds
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


def measure(step: Step, count: int, repeats: int) -> dict[str, float | str]:
    """Microseconds of a step by each contender, which take turns; a reason where one failed."""
    inputs = arrays(step)
    builders = {
        "ours": ours(step, None, count),
        "xla": ours(step, "xla", count),
        "cudnn": cudnn(step, count),
    }
    programs: dict[str, Any] = {}
    found: dict[str, float | str] = {}
    for name, function in builders.items():
        try:
            program = jax.jit(function).lower(*inputs).compile()
            programs[name] = program, calls_within(0.1, program, *inputs)
        except Exception as error:  # a peer may fail in any way; the table says how
            found[name] = reason_of(error)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, (program, calls) in programs.items():
            seconds = median_seconds(program, *inputs, calls=calls, repeats=1)
            times[name].append(1e6 * seconds / count)
    return found | {name: statistics.median(values) for name, values in times.items()}


def line(step: Step, found: dict[str, float | str]) -> str:
    """One line of the table."""
    cells = [f"{step.name:16s}"]
    for name, time in found.items():
        if isinstance(time, str):
            cells.append(f"{name}: {time[:60]}")
            continue
        rate = f"{step.flops() / time / 1e6:4.0f} TFLOP/s" if step.tokens > 1 else ""
        rate = rate or f"{step.bytes() / time / 1e6:4.2f} TB/s"
        cells.append(f"{name} {time:8.1f} us {rate}")
    return "  ".join(cells)


def main() -> None:
    """Prints each row when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", nargs="+", choices=[x.name for x in STEPS])
    parser.add_argument("--count", type=int, default=64, help="steps of a scan")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    results = {}
    for step in STEPS:
        if arguments.steps is None or step.name in arguments.steps:
            results[step.name] = measure(step, arguments.count, arguments.repeats)
            print(line(step, results[step.name]), flush=True)
    if arguments.output is not None:
        text = json.dumps({"machine": machine(), "microseconds": results}, indent=1)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
