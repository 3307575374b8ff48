"""Times candidates for the Triton kernels' tiles: ``python -m benchmarks.tiles [SHAPE ...]``.

Each kernel is timed alone, on one sequence, and printed from fast to slow as useful TFLOP/s;
`pallas_kernels._triton.tiles` holds what won.
"""

import argparse
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from benchmarks._shapes import SHAPES, Shape
from benchmarks._timing import median_seconds
from pallas_kernels._kernels import BackwardInputs, ForwardInputs, Queries
from pallas_kernels._spec import KeyRun, Spec
from pallas_kernels._triton.backward_dkv import backward_dkv
from pallas_kernels._triton.backward_dq import backward_dq
from pallas_kernels._triton.forward import forward
from pallas_kernels._triton.tiles import TritonTiles


def candidates(kernel: str, shape: Shape) -> list[TritonTiles]:
    """Tiles worth a try: those of the right order of registers."""
    dim, group = shape.dim, shape.heads // shape.kv_heads
    short = shape.window is not None and shape.window < 512
    sizes = {
        "forward": [(128, 128), (128, 64), (64, 64), (64, 128), (128, 32), (64, 32)],
        "query": [(128, 64), (128, 128), (64, 64), (64, 128), (128, 32), (64, 32)],
        "keys": [(64, 128), (64, 64), (128, 64), (32, 128), (128, 128), (32, 64)],
    }[kernel]
    if dim > 128:
        sizes = [(q, k) for q, k in sizes if q * k <= 128 * 64]
    unmasked_loops = (False, True) if short else (True,)
    heads = {1, min(2, group), min(4, group), min(8, group)}
    found = []
    for (query, key), warps, stages, unmasked_loop, packed in itertools.product(
        sizes, (4, 8), (2, 3, 4), unmasked_loops, sorted(heads)
    ):
        if dim <= 64 and warps == 8 and query * key < 128 * 128:
            continue
        if dim > 64 and warps == 4 and query * key > 64 * 64:
            continue
        if dim > 128 and stages > 3:
            continue
        found.append(TritonTiles(query // packed, key, warps, stages, unmasked_loop, packed))
    return found


def launches(shape: Shape, kernel: str):
    """(name, function, arrays) of what to time, and the share of the useful work in each."""
    keys = jax.random.split(jax.random.key(0), 4)
    dims = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    query, key, value, dout = (
        jax.random.normal(seed, (1, shape.length, heads, shape.dim), jnp.bfloat16)
        for seed, heads in zip(keys, dims, strict=True)
    )
    spec = Spec(shape.window, 0, shape.dim**-0.5, None, "highest")
    start = jnp.int32(0)
    rows = shape.length

    def run_forward(tiles, query, key, value):
        return forward(
            spec, ForwardInputs(query, (KeyRun(key, value, 0),), None, None, start), None,
            rows=(0, rows), resume=False, out_dtype=query.dtype, tiles=tiles, interpret=False,
        )  # fmt: skip

    def run_query(tiles, query, key, value, dout, out, lse, delta):
        return backward_dq(
            spec,
            BackwardInputs(query, (KeyRun(key, value, 0),), None, start, out, dout, lse), None,
            rows=rows, out_dtype=query.dtype, tiles=tiles, interpret=False,
        )  # fmt: skip

    def run_keys(wanted):
        def run(tiles, query, key, value, dout, out, lse, delta):
            return backward_dkv(
                spec, Queries(query, dout, lse, delta, start), KeyRun(key, value, 0), None,
                rows=rows, out_dtype=query.dtype, tiles=tiles, wanted=wanted, interpret=False,
            )  # fmt: skip

        return run

    if kernel == "forward":
        return {"forward": run_forward}, (query, key, value)
    tiles = TritonTiles(64, 64, 4 if shape.dim <= 128 else 8, 2)
    state = jax.jit(lambda *a: run_forward(tiles, *a))(query, key, value)
    delta = jnp.einsum("btnh,btnh->bnt", state.out, dout, preferred_element_type=jnp.float32)
    arrays = (query, key, value, dout, state.out, state.lse, delta)
    if kernel == "query":
        return {"query": run_query}, arrays
    runs = {"keys": run_keys((True, True))}
    if shape.dim > 128:
        runs |= {"dkey": run_keys((True, False)), "dvalue": run_keys((False, True))}
    return runs, arrays


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), help="names of shapes")
    parser.add_argument("--kernels", nargs="*", default=["forward", "query", "keys"])
    parser.add_argument("--show", type=int, default=6, help="rows a kernel")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}", flush=True)
    for name, kernel in itertools.product(arguments.shapes, arguments.kernels):
        shape = SHAPES[name]
        runs, arrays = launches(shape, kernel)
        jobs = list(itertools.product(runs, candidates(kernel, shape)))

        def build(job, runs=runs, arrays=arrays):
            launch, tiles = job
            try:
                run = jax.jit(lambda *a: runs[launch](tiles, *a))
                return run.lower(*arrays).compile()
            except jax.errors.JaxRuntimeError as error:
                return str(error).splitlines()[0][:60]

        with ThreadPoolExecutor(16) as pool:
            built = list(pool.map(build, jobs))
        rows = []
        for (launch, tiles), run in zip(jobs, built, strict=True):
            if isinstance(run, str):
                continue
            seconds = median_seconds(run, *arrays, calls=5, repeats=3)
            rows.append((launch, seconds, tiles))
        for launch in runs:
            best = sorted((r for r in rows if r[0] == launch), key=lambda r: r[1])
            failed = sum(isinstance(run, str) for run in built)
            print(f"{name} {launch}: {len(best)} tiles, {failed} did not compile")
            for _, seconds, tiles in best[: arguments.show]:
                rate = shape.forward_flops() / seconds / 1e12
                print(
                    f"  {seconds * 1e3:8.3f} ms  {rate:5.0f} forward TFLOP/s  "
                    f"{tiles.query}x{tiles.heads} k{tiles.key} w{tiles.warps} s{tiles.stages} "
                    f"u{tiles.unmasked_loop:d}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
