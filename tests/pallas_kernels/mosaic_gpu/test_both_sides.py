"""Launches of one chunk whose queries see keys before and after it, beside the oracle."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KeyRun, Spec
from pallas_kernels._implementations import kernels_of
from pallas_kernels._kernels import BackwardInputs, ForwardInputs
from tests.helpers import oracle
from tests.helpers.routes import compare
from tests.helpers.simulator import launches, simulated


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk of a longer sequence, and how many keys around it are here."""

    first: int
    length: int
    whole: int
    window: tuple[int, int]
    before: int
    after: int
    dims: tuple[int, int] = (128, 128)
    heads: tuple[int, int] = (2, 1)

    def arrays(self):
        """q, k, v and dout of the whole sequence, zeros where no queries of the chunk are."""
        rng = np.random.default_rng(0)
        heads, kv_heads = self.heads
        shapes = zip((heads, kv_heads, kv_heads, heads), (0, 0, 1, 1), strict=True)
        q, k, v, dout = (
            rng.standard_normal((1, self.whole, n, self.dims[m])).astype(np.float32)
            for n, m in shapes
        )
        dout[:, : self.first] = dout[:, self.first + self.length :] = 0
        return q, k, v, dout


CHUNKS = {
    "middle": Chunk(136, 136, 408, (70, 60), 70, 60),
    # On these two some tiles of keys hold the sequence's edge, and some queries see all the rest.
    "last": Chunk(160, 200, 360, (160, 150), 160, 150, dims=(32, 32)),
    "first": Chunk(0, 200, 400, (20, 130), 20, 130, dims=(32, 32)),
    "longer_than_the_chunk": Chunk(136, 136, 272, (150, 200), 136, 136),
    "wide_heads": Chunk(264, 136, 400, (70, 60), 70, 60, dims=(192, 128)),
}


def run(chunk, implementation, dtype):
    """(out, dq, dk, dv) of the chunk's queries; keys outside the sequence must not matter."""
    q, k, v, dout = (jnp.asarray(x, dtype) for x in chunk.arrays())
    left, right = chunk.window
    spec = Spec(left + right, 0, 0.1, None, "highest", lookahead=right)
    around = ((0, 0), (chunk.before, chunk.after), (0, 0), (0, 0))
    k, v = (jnp.pad(x, around, constant_values=5) for x in (k, v))
    begin, runs = chunk.first, []
    offset = spec.first_key - chunk.before
    for size in (chunk.before, chunk.length, chunk.after):
        runs.append(KeyRun(k[:, begin : begin + size], v[:, begin : begin + size], offset))
        begin, offset = begin + size, offset + size
    here = slice(chunk.first, chunk.first + chunk.length)
    q, dout = q[:, here], dout[:, here]
    bounds = spec.moved(jnp.int32(-chunk.first), jnp.int32(chunk.whole - chunk.first))
    kernels, rows = kernels_of(implementation), chunk.length
    inputs = ForwardInputs(q, tuple(runs), None, None, *bounds)
    out, lse = kernels.forward(spec, inputs, None, rows=(0, rows), resume=False, out_dtype=q.dtype)
    inputs = BackwardInputs(q, tuple(runs), None, bounds[0], out, dout, lse, bounds[1])
    found = kernels.backward(
        spec, inputs, None, rows=rows, dquery_dtype=q.dtype, dkey_dtype=q.dtype
    )
    dk, dv = (jnp.concatenate(x, axis=1) for x in zip(*found.dkeys, strict=True))
    return out, found.dquery, dk, dv


def expected(chunk, dtype):
    """What `run` should return."""
    q, k, v, dout = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in chunk.arrays())
    mask = oracle.visible(np.zeros(chunk.whole, np.int64), chunk.window)[None]
    out, dq, dk, dv, _ = oracle.attention(q, k, v, dout, mask, scale=0.1)
    here = slice(chunk.first, chunk.first + chunk.length)
    around = ((0, 0), (chunk.before, chunk.after), (0, 0), (0, 0))
    near = slice(chunk.first, chunk.first + chunk.before + chunk.length + chunk.after)
    return out[:, here], dq[:, here], *(np.pad(x, around)[:, near] for x in (dk, dv))


def check(chunk, implementation, dtype):
    result = run(chunk, implementation, dtype)
    inside = np.arange(result[2].shape[1]) + chunk.first - chunk.before
    inside = ((inside >= 0) & (inside < chunk.whole))[None, :, None, None]
    out, dq, *dkeys = result
    dkeys = (np.where(inside, np.asarray(x, np.float64), 0) for x in dkeys)
    fields = (out, dq, *dkeys, None)
    compare(oracle.Result(*fields), oracle.Result(*expected(chunk, dtype), None), dtype, chunk)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "xla") for name in CHUNKS),
        *(pytest.param(name, "triton", marks=pytest.mark.slow) for name in CHUNKS),
    ],
)
def test_keys_around_a_chunk(name, implementation):
    check(CHUNKS[name], implementation, "float32")


@pytest.mark.parametrize(
    "name",
    ["last", "first", *(pytest.param(x, marks=pytest.mark.slow) for x in ("middle", "wide_heads"))],
)
def test_keys_around_a_chunk_on_a_hopper(name, on_hopper):
    with simulated():
        check(CHUNKS[name], "mosaic_gpu", "bfloat16")
        assert {"ring_swa_forward", "ring_swa_backward_fused"} <= set(launches)
