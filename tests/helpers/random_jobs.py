"""Random calls of the library, over several devices or one, beside the oracle.

`tests.helpers.cases.random_case` draws what is computed, for the routes of `tests.helpers.routes`.
Here it is drawn how as well: exchanges and layouts by name, meshes that cut more than the sequence,
windows to both sides, transformations, and NaN in padding.
"""

import contextlib
import dataclasses
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType

from tests.helpers import exchanges, played_ring
from tests.helpers.cases import Case, random_runs
from tests.helpers.oracle import Result
from tests.helpers.pool import compiled_program
from tests.helpers.routes import (
    ROUTES,
    SEQUENCE,
    compare,
    documents_of,
    place,
    with_gradients,
)

CHUNKS = (65, 72, 100, 127, 128, 129, 191, 257, 300, 320)
"""Lengths next to edges of tiles, and others; many are no multiple of 8."""
TILE = 64
DIMS = ((16, 16), (32, 16), (48, 80), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
"""(H, Hv) that all kernels take."""
HEADS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (3, 1), (6, 2), (12, 3))
"""(N, K)."""
SAVED = checkpoint_policies.save_only_these_names("context")


@dataclasses.dataclass(frozen=True)
class RandomJob:
    """A call. Its repr is Python: paste it into `check(RandomJob(...))`.

    Attributes:
        case: the problem; its devices are those that cut the sequence.
        implementation: as everywhere.
        played: one device plays all of them, as `tests.helpers.played_ring` does.
        exchange: as everywhere.
        layout: as everywhere.
        axes: the mesh's axes "data" and "model", and their sizes.
        explicit: whether the mesh's axes are Explicit.
        transformation: "remat" or "vmap" around the call, or None.
        nan: whether padding, the cotangent's too, is NaN.
    """

    case: Case
    implementation: str | None
    played: bool = False
    exchange: str | None = None
    layout: str = "contiguous"
    axes: tuple = ()
    explicit: bool = False
    transformation: str | None = None
    nan: bool = False

    def prepare(self):
        """(compiled program, its arguments, the oracle's Result)."""
        program, mesh = self.program()
        arguments = self.arguments()
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            (*qkv, sink, documents, dout) = arguments
            q, k, v, dout = place(mesh, SEQUENCE, *qkv, dout)
            arguments = (q, k, v, sink, documents, dout)
            return compiled_program(program, arguments), arguments, self.case.expected

    def program(self):
        """((q, k, v, sink_logits, documents, dout) -> Result, mesh)."""
        case = self.case
        if self.played:
            return played_ring.program(case, self.implementation), None
        whole = case.packed or case.documents is None
        if case.devices == 1 and not self.axes:
            route = ROUTES["one_device" if whole else "global_local"]
        elif whole and not (self.axes or self.explicit or self.layout != "contiguous"):
            route = exchanges.per_shard(self.exchange)
        else:
            sizes = dict(self.axes)
            names = {"data": "batch_axis", "model": "head_axis"}
            route = exchanges.whole_arrays(
                self.exchange,
                self.layout,
                axis_type=AxisType.Explicit if self.explicit else AxisType.Auto,
                sizes=dict(seq=case.devices) | sizes,
                **{names[name]: name for name in sizes},
            )
        call, mesh = route(case, self.implementation)
        return with_gradients(self._transformed(call)), mesh

    def _transformed(self, call):
        if self.transformation == "remat":
            return jax.checkpoint(call, policy=SAVED)
        if self.transformation is None:
            return call

        def each_row(q, k, v, sink, ids):
            rows = [None if x is None else x[:, None] for x in (q, k, v, ids)]
            axes = (0, 0, 0, None, None if ids is None else 0)
            return jax.vmap(call, in_axes=axes)(*rows[:3], sink, rows[3])[:, 0]

        return each_row

    def arguments(self):
        """q, k, v, sink_logits, documents and the cotangent."""
        (*qkv, sink), dout = self.case.arrays()
        arrays = (*qkv, dout)
        if self.nan:
            start, end = played_ring.bounds(self.case)
            padding = (start == end)[..., None, None]
            arrays = (jnp.where(padding, jnp.nan, x) for x in arrays)
        q, k, v, dout = arrays
        return q, k, v, sink, documents_of(self.case), dout


def check(job: RandomJob):
    """Runs a job twice: the oracle's output and gradients, the same bits."""
    compare_and_repeat(job, job.prepare())


def compare_and_repeat(job: RandomJob, prepared):
    """As `check`, of what `RandomJob.prepare` returns."""
    program, arguments, expected = prepared
    results = [jax.device_get(tuple(program(*arguments))) for _ in range(2)]
    compare(Result(*results[0]), expected, job.case.dtype)
    if job.implementation == "mosaic_gpu_nondeterministic":
        return
    for name, *both in zip(Result._fields, *results, strict=True):
        first, second = (None if x is None else np.asarray(x).tobytes() for x in both)
        assert first == second, f"{name} differs in a second run"


def random_job(
    rng: random.Random, devices: int, implementations: tuple, *, chunks=CHUNKS, dims=DIMS
) -> RandomJob:
    """A job over all of the devices; over one, perhaps that of a ring that it plays."""
    played = devices == 1 and rng.random() < 0.6
    axes = () if played else rng.choice(_AXES[devices])
    seq = rng.choice((2, 2, 3)) if played else devices // math.prod(size for _, size in axes)
    chunk = rng.choice(chunks) if seq > 1 else rng.choice(chunks) * rng.choice((1, 2, 3))
    implementation = rng.choice(implementations)
    if played and implementation is None:
        implementation = implementations[0]
    kind = "segments" if axes else rng.choice(("whole", "segments", "packed"))
    is_ring = kind != "packed" and not played and seq > 1
    explicit = is_ring and not axes and rng.random() < 0.3
    layout = "contiguous"
    if is_ring and not explicit and rng.random() < 0.3:
        layout, chunk = "dual_chunk", chunk // 2 * 2
    window, exchange = random_window(rng, chunk, seq * chunk), "halo"
    if not played:
        exchange = rng.choice(exchanges_for(window, seq * chunk)) if seq > 1 else None
    elif None in np.atleast_1d(window):
        window = rng.randint(0, seq * chunk)
    cut = dict(axes).get("model", 1) * (seq if exchange == "all_to_all" else 1)
    case = _random_case(
        rng,
        Case(chunk, seq, window, batch=2 * dict(axes).get("data", 1)),
        kind,
        heads=[x for x in HEADS if x[0] % cut == 0],
        dims=dims,
        half_precision=(implementation or "").startswith("mosaic"),
    )
    transformation = rng.choice((None, None, None, "remat", "vmap"))
    if played or explicit or axes or (transformation == "vmap" and kind == "packed"):
        transformation = None
    nan = case.documents is not None and rng.random() < 0.5
    return RandomJob(
        case, implementation, played, exchange, layout, axes, explicit, transformation, nan
    )


def _random_case(rng, case: Case, kind: str, *, heads, dims, half_precision) -> Case:
    """The case with all that does not depend on how it is computed."""
    chosen_heads = rng.choice(heads)
    dtype = rng.choice(("float32", "bfloat16", "bfloat16", "float16"))
    if half_precision and dtype == "float32":
        dtype = "bfloat16"
    batch, documents = 1 if kind == "packed" else case.batch, None
    if kind != "whole":
        documents = tuple(
            random_runs(rng, rng.choice((case.chunk, TILE)), case.length, kind == "segments")
            for _ in range(batch)
        )
    return dataclasses.replace(
        case,
        sinks=min(case.chunk, rng.choice((0, 0, 0, 1, 4, 15, 16, 17, 64, 65))),
        documents=documents,
        packed=kind == "packed",
        batch=batch,
        heads=chosen_heads,
        dims=rng.choice([x for x in dims if dtype != "float32" or max(x) <= 128]),
        softcap=rng.choice((None, None, 2.0, 30.0)),
        learned=rng.random() < 0.4,
        scale=rng.choice((None, None, 0.2, -0.1)),
        dtype=dtype,
        seed=rng.randrange(2**16),
    )


_AXES = {
    1: ((),),
    2: ((), (), (), (("data", 2),), (("model", 2),)),
    4: ((), (), (), (("data", 2),), (("model", 2),)),
}
"""Axes beside the sequence's, by the number of devices."""


def random_window(rng: random.Random, chunk: int, length: int):
    """A window, half of the time to both sides; its bounds are next to edges."""
    edges = [m + d for m in (TILE, 2 * TILE, chunk, 2 * chunk) for d in (-1, 0, 1)]
    bounds = [0, 1, *edges, *edges, length - 1, length + 5, None, None]
    bounds += [rng.randint(0, chunk), rng.randint(0, length)]
    if rng.random() < 0.5:
        return rng.choice(bounds)
    return rng.choice(bounds), rng.choice(bounds)


def exchanges_for(window, length: int) -> list[str | None]:
    """The exchanges that a window allows."""
    left, right = window if isinstance(window, tuple) else (window, 0)
    known: list[str | None] = [None, "all_to_all"]
    if None not in (left, right):
        known += ["halo", "halo"]
    if any(bound is None or bound >= length - 1 for bound in (left, right)):
        known.append("ring")
    return known
