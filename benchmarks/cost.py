"""Time and memory against sequence length at a fixed window: ``python -m benchmarks.cost``.

Forward and backward of one attention call on one device; the memory is what the compiled program
asks for besides its arguments and results. Both should double with the length.
"""

import argparse

import jax
import jax.numpy as jnp

from benchmarks._timing import median_seconds
from ring_swa_jax import ring_attention


def main() -> None:
    """Prints a line a length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window", type=int, default=255)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--implementation")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, window {arguments.window}")
    print("4 query heads, 2 key/value heads, head dim 64, float32, forward and backward")

    def loss(q, k, v):
        out = ring_attention(
            q,
            k,
            v,
            window_size=arguments.window,
            seq_axis=None,
            implementation=arguments.implementation,
        )
        return out.astype(jnp.float32).sum()

    for length in arguments.lengths:
        seeds = jax.random.split(jax.random.key(0), 3)
        q, k, v = (
            jax.random.normal(seed, (1, length, heads, 64))
            for seed, heads in zip(seeds, (4, 2, 2), strict=True)
        )
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
        analysis = program.memory_analysis()
        memory = analysis.temp_size_in_bytes if analysis is not None else float("nan")
        seconds = median_seconds(program, q, k, v, calls=1, repeats=3)
        print(f"{length:7d} tokens {seconds * 1e3:9.1f} ms {memory / 2**20:8.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
