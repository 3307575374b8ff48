"""Cases for GPUs: the odd ones on one GPU, and random ones around tile edges."""

import dataclasses
import random

from pallas_kernels._mosaic_gpu.backward.sinks import MAX_SINKS, SHORTEST_WINDOW
from tests.helpers.cases import HEADS, Case, random_runs
from tests.helpers.odd_cases import ODD

TILE = 64
DIMS = [(16, 16), (32, 16), (48, 80), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]


def on_one_device(case):
    """The same sequence on one device, with head dims that all implementations take."""
    dims = tuple(-(-dim // 16) * 16 for dim in case.dims)
    return dataclasses.replace(case, chunk=case.length, devices=1, dims=dims)


def odd_cases():
    """Every odd case in float32 and in bfloat16, by name; those about a dtype in theirs alone."""
    return {
        f"{name}-{dtype}": dataclasses.replace(on_one_device(case), dtype=dtype)
        for name, case in ODD.items()
        for dtype in (("float32", "bfloat16") if case.dtype == "float32" else (case.dtype,))
    }


def edge_case(rng: random.Random, devices=1) -> Case:
    """A random case longer than a tile, its window and documents next to edges of tiles."""
    chunk = rng.choice([65, 100, 127, 128, 129, 191, 257, 300, 511, 700])
    length = devices * chunk
    edges = [0, 1, 63, 64, 65, 127, 128, 129, chunk - 1, chunk, chunk + 1]
    most = chunk if devices > 1 else length + 2
    kind = rng.choice(["whole", "segments", "packed"])
    batch = {"whole": rng.randint(1, 2), "segments": 2, "packed": 1}[kind]
    documents = None
    if kind != "whole":
        documents = tuple(random_runs(rng, TILE, length, kind == "segments") for _ in range(batch))
    dtype = rng.choice(["float32", "bfloat16", "bfloat16", "float16"])
    return Case(
        chunk=chunk,
        devices=devices,
        window=rng.choice([*edges, *edges, length, None, rng.randint(0, length)]),
        sinks=min(most, rng.choice([0, 0, 1, 4, 15, 16, 17, 64, 65])),
        documents=documents,
        packed=kind == "packed",
        batch=batch,
        heads=rng.choice(HEADS),
        dims=rng.choice(DIMS if dtype != "float32" else [d for d in DIMS if max(d) <= 128]),
        softcap=rng.choice([None, None, 2.0, 30.0]),
        learned=rng.random() < 0.4,
        scale=rng.choice([None, None, 0.2]),
        dtype=dtype,
        seed=rng.randrange(2**16),
    )


def to_both_sides(case: Case) -> Case:
    """The case with a window that reaches past the query; its bounds are next to edges of tiles."""
    rng = random.Random(case.seed)
    bounds = [0, 1, 63, 64, 65, 127, 128, 129, case.chunk, rng.randint(0, case.length), None]
    left, right = rng.choice(bounds), rng.choice([bound for bound in bounds if bound != 0])
    return dataclasses.replace(case, window=(left, right))


def in_half_precision(case: Case) -> Case:
    """The case in half precision."""
    dtype = "bfloat16" if case.dtype == "float32" else case.dtype
    return dataclasses.replace(case, dtype=dtype)


def for_fused(case: Case) -> Case:
    """The case as a fused Mosaic backward kernel takes it: its head dims, and its sink tokens."""
    dim, value_dim = case.dims
    if dim > 128:
        value_dim = -(-value_dim // 64) * 64
    else:
        dim, value_dim = -(-dim // 32) * 32, min(128, value_dim)
    sinks = case.sinks
    if case.window is not None:
        sinks = min(sinks, MAX_SINKS) if case.window >= SHORTEST_WINDOW else 0
    return dataclasses.replace(case, sinks=sinks, dims=(dim, value_dim))


SHORT = Case(1336, 1, 127, batch=2, heads=(8, 2), dims=(64, 64), dtype="bfloat16")
LAYER = Case(1336, 1, None, batch=2, heads=(4, 2), dims=(128, 128), dtype="bfloat16")
ROWS = ((300, 700, -36, 300), (1025, 311))
# Tiles of keys enough to wait for one another in the fused Mosaic backward kernel; and logits that
# grow from tile to tile, as those of random queries and keys hardly do.
LONG = {
    "full_causal": LAYER,
    "full_causal_rows": dataclasses.replace(LAYER, documents=ROWS),
    "long_window": dataclasses.replace(LAYER, window=500, documents=ROWS, softcap=20.0),
    "negative_scale": dataclasses.replace(LAYER, window=300, scale=-0.1, dims=(96, 80)),
    "steep": dataclasses.replace(LAYER, window=700, documents=ROWS, scale=0.8, learned=True),
    "steep_wide": dataclasses.replace(LAYER, scale=0.5, dims=(192, 128), dtype="float16"),
    "sinks": dataclasses.replace(LAYER, window=400, sinks=4),
    "sinks_rows": dataclasses.replace(LAYER, window=200, sinks=64, documents=ROWS, softcap=20.0),
    "sinks_small": dataclasses.replace(
        LAYER, window=63, sinks=9, documents=ROWS, dims=(64, 48), learned=True, dtype="float16"
    ),
    "sinks_wide": dataclasses.replace(LAYER, window=200, sinks=5, dims=(256, 256), softcap=20.0),
    "wide": dataclasses.replace(LAYER, window=300, dims=(256, 256)),
    "wide_rows": dataclasses.replace(
        LAYER, window=700, documents=ROWS, dims=(256, 256), softcap=20.0, learned=True
    ),
    "wide_full_causal": dataclasses.replace(LAYER, documents=ROWS, dims=(192, 256)),
    "wide_negative_scale": dataclasses.replace(LAYER, window=65, scale=-0.05, dims=(192, 128)),
    "short": SHORT,
    "short_rows": dataclasses.replace(SHORT, documents=ROWS, window=128, learned=True),
    "short_capped": dataclasses.replace(SHORT, window=65, heads=(3, 3), softcap=5.0, dims=(32, 64)),
    "short_negative_scale": dataclasses.replace(SHORT, window=31, scale=-0.1, dtype="float16"),
}
# Chunks whose dquery begins with a halo's, and whose keys' gradients travel in float32.
CHUNKS = {
    "short": dataclasses.replace(SHORT, chunk=672, devices=2),
    "short_hops": dataclasses.replace(SHORT, chunk=72, devices=3, window=128, heads=(4, 1)),
    "sinks": dataclasses.replace(LAYER, chunk=672, devices=2, window=300, sinks=16),
    "sinks_rows": dataclasses.replace(
        LAYER, chunk=672, devices=3, window=100, sinks=40, documents=((650, 700, -66, 600), (2016,))
    ),
    "sinks_in_halo": dataclasses.replace(
        LAYER, chunk=336, devices=2, window=128, sinks=3, documents=((250, 422), (672,))
    ),
    "wide": dataclasses.replace(LAYER, chunk=328, devices=2, window=300, dims=(256, 256)),
    "wide_hops": dataclasses.replace(LAYER, chunk=136, devices=3, window=200, dims=(192, 128)),
    "sinks_wide": dataclasses.replace(
        LAYER,
        chunk=328,
        devices=2,
        window=100,
        sinks=16,
        documents=((300, 356), (656,)),
        dims=(192, 128),
    ),
    "sinks_hops": dataclasses.replace(LAYER, chunk=264, devices=4, window=270, sinks=5),
}
