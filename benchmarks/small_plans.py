"""Times Triton plans for GPUs with less shared memory: ``python -m benchmarks.small_plans``.

Each plan that `pallas_kernels._triton.plans` takes for an L4 (99 KiB), an A100 (163 KiB) and an
H100 (227 KiB) runs on the GPU at hand, beside "xla" and cuDNN, so that their order is known
somewhere. Programs take turns, so a GPU that slows down slows down all of them. Prints
milliseconds and writes JSON.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import ring_swa_jax
from benchmarks._gpus import hold, share_machine
from benchmarks._results import write
from benchmarks._timing import in_turns
from benchmarks.attention import reason_of
from pallas_kernels import _device
from pallas_kernels._triton.plans import Shapes, triton_plan

GPUS = {"H100": "NVIDIA H100", "A100": "NVIDIA A100", "L4": "NVIDIA L4"}
HEADS, KV_HEADS = 32, 8
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
WINDOWS = (127, 1023, None)


@dataclasses.dataclass(frozen=True)
class Job:
    """A program: heads of these sizes under a window, by a plan or a peer, one way or both."""

    dims: tuple[int, int]
    window: int | None
    contender: str
    both: bool


def attention(job: Job) -> Callable[..., Any]:
    """The function of query, key and value."""
    if job.contender == "cudnn":
        return functools.partial(
            jax.nn.dot_product_attention,
            is_causal=True,
            local_window_size=None if job.window is None else (job.window, 0),
            implementation="cudnn",
        )
    return functools.partial(
        ring_swa_jax.ring_sliding_window_attn,
        window_size=job.window,
        implementation="xla" if job.contender == "xla" else "triton",
    )


def types(job: Job, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of query, key, value and the cotangent."""
    dim, value_dim = job.dims
    return tuple(
        jax.ShapeDtypeStruct((1, length, heads, size), jnp.bfloat16)
        for heads, size in (
            (HEADS, dim), (KV_HEADS, dim), (KV_HEADS, value_dim), (HEADS, value_dim)
        )
    )  # fmt: skip


def lower(job: Job, length: int) -> Any:
    """The traced program, by the plan of its GPU."""
    attend = attention(job)

    def run(query, key, value, dout):
        if not job.both:
            return attend(query, key, value)
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(dout)

    # A function of its own for each plan: jit would find the trace of another one.
    arguments = types(job, length)
    if job.contender not in GPUS:
        return jax.jit(run).lower(*arguments)
    gpu = _device.gpu_of_kind(GPUS[job.contender])
    with mock.patch.object(_device, "compiled_gpu", return_value=gpu):
        return jax.jit(run).lower(*arguments)


def contenders(dims: tuple[int, int], window: int | None, length: int) -> list[str]:
    """Those GPUs whose plans differ, and the peers."""
    plans: dict[Any, str] = {}
    for name, kind in GPUS.items():
        shapes = Shapes(jnp.dtype("bfloat16"), *dims, window, HEADS // KV_HEADS, length)
        plan = triton_plan("triton", shapes, _device.gpu_of_kind(kind))
        plans.setdefault(plan, name)
    return [*plans.values(), "xla", "cudnn"]


def build(lowered: Any) -> Any:
    """The compiled program, or why there is none."""
    if isinstance(lowered, str):
        return lowered
    try:
        return lowered.compile()
    except Exception as error:  # the table says how a plan or a peer fails
        return reason_of(error)


def try_lower(job: Job, length: int) -> Any:
    """As `lower`, or why that fails."""
    try:
        return lower(job, length)
    except Exception as error:  # the table says how a plan or a peer fails
        return reason_of(error)


def main() -> None:
    """Prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("small_plans.json"))
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one tiny row: a smoke test")
    parser.add_argument("--lock", type=Path, help="folder of locks, one for each GPU")
    arguments = parser.parse_args()
    share_machine()
    length, rounds = (128, 1) if arguments.quick else (arguments.length, arguments.rounds)
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {device}, T {length}, heads {HEADS}/{KV_HEADS}", flush=True)
    settings = list(itertools.product(DIMS, WINDOWS))[: 1 if arguments.quick else None]
    jobs = [
        Job(dims, window, contender, both)
        for dims, window in settings
        for contender in contenders(dims, window, length)
        for both in (False, True)
    ]
    lowered = [try_lower(job, length) for job in jobs]  # the patched plan: one at a time
    with ThreadPoolExecutor(16) as pool:
        built = dict(zip(jobs, pool.map(build, lowered), strict=True))
    print(f"{len(jobs)} programs built", flush=True)
    hold(arguments.lock, range(1))
    records = []
    for dims, window in settings:
        mine = [job for job in jobs if (job.dims, job.window) == (dims, window)]
        compiled = [job for job in mine if not isinstance(built[job], str)]
        seeds = jax.random.split(jax.random.key(0), 4)
        arrays = tuple(
            jax.random.normal(seed, x.shape, x.dtype)
            for seed, x in zip(seeds, types(mine[0], length), strict=True)
        )
        programs = {job: (built[job], arrays) for job in compiled}
        times, raised = in_turns(programs, rounds=rounds, seconds=0.03)
        found = {job: 1e3 * statistics.median(x) for job, x in times.items()}
        reasons = built | {job: reason_of(error) for job, error in raised.items()}
        for job in mine:
            reason = None if job in found else reasons[job]
            records.append({**dataclasses.asdict(job), "ms": found.get(job), "reason": reason})
            name = f"{dims[0]}-{dims[1]} W {window} {'both' if job.both else 'forward'}"
            shown = f"{found[job]:9.3f} ms" if job in found else reason
            print(f"{name:<24}{job.contender:<8}{shown}", flush=True)
        machine = {"device": device, "jax": jax.__version__}
        write(arguments.output, {"machine": machine, "length": length, "rows": records})


if __name__ == "__main__":
    main()
