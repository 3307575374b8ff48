"""The Mosaic GPU kernels, on a CPU, beside "xla": every one of them by itself.

`tests.test_gpu` compares them with the oracle on a GPU, and many more cases.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _device, _mosaic, _tiles, _xla
from pallas_kernels._spec import KeyRun, SinkRun, Spec
from tests.simulator import simulated


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard's own keys, or its halo's if its ``offset`` is not 0."""

    window: int | None
    dims: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (2, 1)
    length: int = 200
    offset: int = 0
    sinks: int = 0
    starts: tuple[int, ...] | None = None
    softcap: float | None = None
    scale: float = 0.1
    dtype: str = "bfloat16"
    ordered: bool = True
    float32: bool = False

    def spec(self):
        return Spec(self.window, self.sinks, self.scale, self.softcap, None)

    def start(self):
        """-100 is before the shard; the sequences of the second row are longer."""
        if self.starts is None:
            return jnp.int32(min(self.offset, -100 if self.sinks else 0))
        rows = np.full((2, self.length), min(self.offset, -100), np.int32)
        for begin in self.starts:
            rows[0, begin:] = begin
        rows[1, self.starts[-1] :] = self.starts[-1]
        return jnp.asarray(rows)

    def arrays(self, seed=0):
        """query, runs, sinks, dout."""
        (heads, kv_heads), (dim, value_dim) = self.heads, self.dims
        batch, rng = 1 if self.starts is None else 2, np.random.default_rng(seed)
        keys = -self.offset or self.length

        def random(length, *dims):
            return jnp.asarray(rng.standard_normal((batch, length, *dims)), self.dtype)

        query, dout = random(self.length, heads, dim), random(self.length, heads, value_dim)
        run = KeyRun(random(keys, kv_heads, dim), random(keys, kv_heads, value_dim), self.offset)
        sinks = None
        if self.sinks and not self.offset:
            fetched = random(self.sinks, kv_heads, dim), random(self.sinks, kv_heads, value_dim)
            sinks = SinkRun(*(x.astype(jnp.float32) for x in fetched))
        return query, (run,), sinks, dout


# The kernel that `_mosaic._fused_kernel` must take, and what it computes.
SHARDS = {
    "no_window": ("any", Shard(None, dims=(96, 48), heads=(4, 2), length=136)),
    "window": ("any", Shard(150, dims=(128, 128), ordered=False)),
    "window_rows": (
        "any",
        Shard(70, dims=(96, 64), starts=(20, 130, 170), softcap=3.0, dtype="float16"),
    ),
    "halo": ("any", Shard(90, offset=-90, dims=(32, 64), float32=True)),
    "halo_rows": ("any", Shard(140, offset=-136, starts=(64, 70), scale=-0.1)),
    "sinks": ("any", Shard(80, sinks=5, heads=(3, 1))),
    "sinks_rows": ("any", Shard(63, sinks=64, starts=(3, 192), softcap=3.0)),
    "wide": ("wide", Shard(100, dims=(256, 256), softcap=3.0)),
    "wide_values": ("wide", Shard(None, dims=(128, 160), length=136)),
    "wide_rows": ("wide", Shard(90, dims=(192, 128), starts=(20, 130), ordered=False)),
    "wide_halo": ("wide", Shard(90, dims=(192, 128), offset=-90, starts=(30, 70), float32=True)),
    "wide_sinks": ("wide", Shard(64, dims=(256, 192), sinks=3, starts=(20, 70))),
    "short": ("short", Shard(128, heads=(4, 2), length=264)),
    "short_rows": ("short", Shard(40, dims=(64, 32), starts=(20, 64, 170), softcap=3.0)),
}


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    """The fused kernels compute all that they can, for a GPU of four multiprocessors."""
    monkeypatch.setattr(_tiles, "fuses_backward", lambda *_: True)
    monkeypatch.setattr(_device, "multiprocessors", lambda: 4)


def near(got, expected, what):
    """Equal but for the rounding of weights and of gradients of logits to half precision."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    assert got.shape == expected.shape and np.isfinite(got).all(), what
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error < 0.008, f"{what}: {error:.3g}"


def single(tree):
    """The same numbers in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


@pytest.mark.parametrize("dims", [(80, 80), (96, 192), (64, 256), (160, 160)])
def test_head_sizes_that_are_left_to_other_kernels(dims):
    shard = Shard(None, dims=dims)
    query, runs, sinks, _ = shard.arrays()
    assert _mosaic._fused_kernel(shard.spec(), query, runs, sinks) is None


@pytest.mark.parametrize("name", SHARDS)
def test_kernels_compute_what_xla_computes(name):
    kernel, shard = SHARDS[name]
    spec, start = shard.spec(), shard.start()
    query, runs, sinks, dout = shard.arrays()
    rows = shard.length if not shard.offset else min(shard.length, -shard.offset)
    assert _mosaic._fused_kernel(spec, query, runs, sinks) == kernel
    offsets = [run.offset for run in runs]
    wide_runs = tuple(KeyRun(*single(run[:2]), n) for run, n in zip(runs, offsets, strict=True))

    options = dict(rows=(0, shard.length), resume=False)
    forward = (spec, single(query), wide_runs, sinks, None, start, None)
    expected = _xla.forward(*forward, **options, out_dtype=jnp.float32)
    if not shard.offset:
        with simulated():
            forward = (spec, query, runs, sinks, None, start, None)
            got = _mosaic.forward(*forward, **options, out_dtype=query.dtype)
        near(got.out, expected.out, "out")
        near(got.lse, expected.lse, "lse")

    more = jnp.ones((*query.shape[:1], 72, *query.shape[2:]), jnp.float32)
    out, dtype = expected.out.astype(query.dtype), jnp.float32 if shard.float32 else query.dtype
    dtypes = dict(rows=rows, dquery_dtype=dtype, dkey_dtype=dtype)
    with simulated():
        got = _mosaic.backward(
            spec, query, runs, sinks, start, out, dout, expected.lse, more,
            ordered=shard.ordered, **dtypes,
        )  # fmt: skip
    wide = single((out, dout, expected.lse, more))
    dtypes |= dict(dquery_dtype=jnp.float32, dkey_dtype=jnp.float32)
    right = _xla.backward(spec, single(query), wide_runs, sinks, start, *wide, **dtypes)
    names = ("dquery", "dkey", "dvalue", *(("dsinks",) * 2 if sinks else ()), "delta")
    leaves = jax.tree.leaves(got), jax.tree.leaves(right)
    for what, a, b in zip(names, *leaves, strict=True):
        near(a, b[..., : a.shape[-1]], what)
