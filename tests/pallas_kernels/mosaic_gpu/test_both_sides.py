"""Launches of one chunk whose queries see keys before and after it, beside the oracle."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KeyRun, SinkRun, Spec
from pallas_kernels._implementations import kernels_of
from pallas_kernels._kernels import BackwardInputs, ForwardInputs
from pallas_kernels._mosaic_gpu.backward import task_splits
from ring_swa_jax._window import Window
from tests.helpers import oracle
from tests.helpers.cases import Case
from tests.helpers.routes import compare
from tests.helpers.simulator import launches, simulated


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk of longer rows, and how many keys around it are here.

    ``documents`` are the lengths of each row's documents, negative for padding; None: one sequence.
    """

    first: int
    length: int
    whole: int
    window: tuple[int | None, int | None]
    before: int = 0
    after: int = 0
    dims: tuple[int, int] = (128, 128)
    heads: tuple[int, int] = (2, 1)
    documents: tuple[tuple[int, ...], ...] | None = None
    sinks: int = 0
    softcap: float | None = None

    @property
    def case(self):
        """The same as one problem on one device."""
        return Case(
            self.whole, 1, self.window, self.sinks, self.documents,
            batch=len(self.documents or "1"), heads=self.heads, dims=self.dims,
            softcap=self.softcap, scale=0.1,
        )  # fmt: skip

    @property
    def here(self):
        """The chunk's positions."""
        return slice(self.first, self.first + self.length)

    def arrays(self, dtype):
        """q, k, v and dout of the whole rows, zeros where no queries of the chunk are."""
        (q, k, v, _), dout = dataclasses.replace(self.case, dtype=dtype).arrays()
        position = np.arange(self.whole)[:, None, None]
        is_here = (position >= self.first) & (position < self.here.stop)
        return q, k, v, jnp.where(is_here, dout, 0)

    def bounds(self):
        """[B, T]: where each query's sequence starts and ends, from the chunk on."""
        ids = self.case.segment_ids()
        start = np.stack([oracle.starts_from_segment_ids(x) for x in ids])
        position = np.arange(self.whole)
        count = (start[:, :, None] == start[:, None]).sum(-1)
        padding = start == oracle.PADDING
        start = np.where(padding, position + 1, start)
        end = start + np.where(padding, 0, count)
        return (jnp.asarray(x[:, self.here] - self.first, jnp.int32) for x in (start, end))


CHUNKS = {
    "middle": Chunk(136, 136, 408, (70, 60), 70, 60),
    # On these two some tiles of keys hold the sequence's edge, and some queries see all the rest.
    "last": Chunk(160, 200, 360, (160, 150), 160, 150, dims=(32, 32)),
    "first": Chunk(0, 200, 400, (20, 130), 20, 130, dims=(32, 32)),
    "longer_than_the_chunk": Chunk(136, 136, 272, (150, 200), 136, 136),
    "wide_heads": Chunk(264, 136, 400, (70, 60), 70, 60, dims=(192, 128)),
}
ROWS = ((37, 190, -22, 90, 69), (300, 108))
SMALL = dict(heads=(1, 1), dims=(32, 32))
FORWARD, FUSED = "ring_swa_forward", "ring_swa_backward_fused"
SHORT, SINKS = "ring_swa_backward_short", "ring_swa_backward_sinks"
FINISH = "ring_swa_backward_finish"
ALL = {FORWARD, FUSED, FINISH}
# What "mosaic_gpu" launches, and the chunk.
VARIED = {
    "documents": (ALL, Chunk(136, 136, 408, (70, 60), 70, 60, documents=ROWS)),
    "documents_alone": (ALL, Chunk(0, 136, 136, (99, 90), documents=((60, 5, -7, 64),), **SMALL)),
    "documents_all": (
        ALL,
        Chunk(0, 264, 264, (None, None), documents=((70, 58, 130, -6), (264,)), dims=(96, 32)),
    ),
    "documents_wide": (
        ALL,
        Chunk(136, 136, 408, (70, 60), 70, 60, documents=ROWS, dims=(192, 128), softcap=3.0),
    ),
    "sinks": ({FORWARD, FUSED, SINKS}, Chunk(0, 264, 264, (70, 40), sinks=5, dims=(64, 64))),
    "sinks_fetched": (
        {FORWARD, FUSED, SINKS}, Chunk(136, 136, 408, (64, 30), 64, 30, sinks=20, dims=(64, 96)),
    ),
    "sinks_documents": (
        {FORWARD, FUSED, SINKS},
        Chunk(136, 136, 408, (64, 60), 64, 60, documents=ROWS, sinks=3, dims=(64, 64)),
    ),
    "short": ({FORWARD, SHORT}, Chunk(0, 264, 264, (64, 64), dims=(64, 64), heads=(4, 2))),
    "short_shifted": ({FORWARD, SHORT}, Chunk(0, 200, 200, (60, 40), dims=(64, 32))),
    "short_documents": (
        {FORWARD, SHORT}, Chunk(0, 408, 408, (50, 64), dims=(64, 64), documents=ROWS, softcap=3.0),
    ),
    "short_ring": (
        {FORWARD, SHORT}, Chunk(72, 72, 216, (60, 61), 60, 61, documents=((80, -4, 132),), **SMALL),
    ),
    "short_last": ({FORWARD, SHORT}, Chunk(200, 200, 400, (30, 64), 30, 64, dims=(32, 64))),
    "all": (ALL, Chunk(0, 256, 256, (None, None), heads=(2, 2), dims=(128, 96))),
    "all_ragged": (ALL, Chunk(0, 136, 136, (None, None), **SMALL)),
}  # fmt: skip


def run(chunk, implementation, dtype):
    """(out, dq, dk, dv) of the chunk's queries; keys outside the rows must not matter.

    Nor does the chunk's own padding, which is NaN.
    """
    q, k, v, dout = chunk.arrays(dtype)
    if chunk.documents is not None:
        padding = jnp.asarray(chunk.case.segment_ids() < 0)[..., None, None]
        q, k, v, dout = (jnp.where(padding, jnp.nan, x) for x in (q, k, v, dout))
    left, right = Window.of(chunk.window).reach(chunk.whole)
    window = None if left is None else left + right
    spec = Spec(window, chunk.sinks, 0.1, chunk.softcap, "highest", lookahead=right)
    runs, sinks = key_runs(chunk, spec, k, v), None
    if chunk.documents is None:
        bounds = jnp.int32(-chunk.first), jnp.int32(chunk.whole - chunk.first)
        bounds = bounds if chunk.length < chunk.whole else (bounds[0], None)
    else:
        bounds = tuple(chunk.bounds())
    if chunk.sinks and chunk.first:
        first = jnp.broadcast_to(bounds[0], (len(q), chunk.length))[:, :1] + chunk.first
        slots = np.minimum(np.asarray(first) + np.arange(chunk.sinks), chunk.whole - 1)
        rows = [jnp.take_along_axis(x, slots[..., None, None], axis=1) for x in (k, v)]
        sinks = SinkRun(*(x.astype(jnp.float32) for x in rows))
    q, dout = q[:, chunk.here], dout[:, chunk.here]
    start, end = spec.moved(*bounds)
    kernels, rows = kernels_of(implementation), chunk.length
    inputs = ForwardInputs(q, runs, sinks, None, start, end)
    out, lse = kernels.forward(spec, inputs, None, rows=(0, rows), resume=False, out_dtype=q.dtype)
    inputs = BackwardInputs(q, runs, sinks, start, out, dout, lse, end)
    found = kernels.backward(
        spec, inputs, None, rows=rows, dquery_dtype=q.dtype, dkey_dtype=q.dtype
    )
    dkeys = [np.concatenate(x, axis=1) for x in zip(*found.dkeys, strict=True)]
    dkeys = [of_whole_rows(chunk, np.asarray(x, np.float32)) for x in dkeys]
    if sinks is not None:
        for total, add in zip(dkeys, found.dsinks, strict=True):
            for row, where in enumerate(slots):
                before = where < chunk.first
                total[row, where[before]] += np.asarray(add)[row, before]
    return out, found.dquery, *dkeys


def key_runs(chunk, spec, k, v):
    """The keys before the chunk, its own and those after it."""
    around = ((0, 0), (chunk.before, chunk.after), (0, 0), (0, 0))
    if chunk.case.segment_ids() is not None:  # padding travels as zeros
        real = jnp.asarray(chunk.case.segment_ids() >= 0)[..., None, None]
        is_own = (np.arange(chunk.whole) >= chunk.first) & (
            np.arange(chunk.whole) < chunk.here.stop
        )
        k, v = (jnp.where(real | is_own[:, None, None], x, 0) for x in (k, v))
    k, v = (jnp.pad(x, around, constant_values=5) for x in (k, v))
    begin, runs = chunk.first, []
    offset = spec.first_key - chunk.before
    for size in (chunk.before, chunk.length, chunk.after):
        if size:
            runs.append(KeyRun(k[:, begin : begin + size], v[:, begin : begin + size], offset))
        begin, offset = begin + size, offset + size
    return tuple(runs)


def of_whole_rows(chunk, gradient):
    """[B, whole, ...]: gradients of the keys around the chunk, without those outside the rows."""
    begin = chunk.first - chunk.before
    whole = np.zeros((len(gradient), chunk.whole, *gradient.shape[2:]), gradient.dtype)
    inside = slice(max(begin, 0), begin + gradient.shape[1])
    whole[:, inside] = gradient[:, inside.start - begin :][:, : chunk.whole - inside.start]
    return whole


def check(chunk, implementation, dtype):
    result = run(chunk, implementation, dtype)
    arrays = (np.asarray(x, np.float64) for x in chunk.arrays(dtype))
    out, dq, dk, dv, _ = oracle.attention(
        *arrays, chunk.case.mask(), scale=0.1, logits_soft_cap=chunk.softcap
    )
    expected = out[:, chunk.here], dq[:, chunk.here], dk, dv
    compare(oracle.Result(*result, None), oracle.Result(*expected, None), dtype, chunk)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "xla") for name in CHUNKS),
        *(pytest.param(name, "triton", marks=pytest.mark.slow) for name in CHUNKS),
    ],
)
def test_keys_around_a_chunk(name, implementation):
    check(CHUNKS[name], implementation, "float32")


CHUNKS_ON_A_HOPPER = ("first", "last", "middle", "wide_heads")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x == "first" else pytest.mark.slow) for x in CHUNKS_ON_A_HOPPER],
)
def test_keys_around_a_chunk_on_a_hopper(name, on_hopper):
    with simulated():
        check(CHUNKS[name], "mosaic_gpu", "bfloat16")
        assert {"ring_swa_forward", "ring_swa_backward_fused"} <= set(launches)


QUICK = {"all_ragged"}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in VARIED]
)
def test_documents_sinks_and_short_windows_on_a_hopper(name, on_hopper):
    kernels, chunk = VARIED[name]
    with simulated():
        check(chunk, "mosaic_gpu", "bfloat16")
        assert set(launches) == kernels


@pytest.mark.slow
def test_tasks_that_are_split_by_queries(on_hopper, monkeypatch):
    """The last of two tiles of keys, in three parts of one or two tiles of queries."""
    monkeypatch.setattr(task_splits, "choose_split", lambda *_, **__: (1, 3))
    task_splits.split_last_tasks.cache_clear()
    with simulated():
        check(Chunk(0, 256, 256, (None, None), **SMALL), "mosaic_gpu", "bfloat16")
        assert set(launches) == ALL
    task_splits.split_last_tasks.cache_clear()
