"""Decoding by kernels, beside the products with all keys that `test_cache` checks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj
from ring_swa_jax import _decode_chunk
from tests.helpers.routes import TOLERANCE, make_mesh


@dataclasses.dataclass(frozen=True)
class Step:
    """New tokens after prompts of different lengths.

    ``valid`` is the share of the new tokens that are no padding.
    """

    tokens: int
    window: int | None
    prompt: int
    sinks: int = 0
    batch: int = 2
    heads: tuple = (2, 1)
    dims: tuple = (16, 16)
    cap: float | None = None
    learned: bool = False
    valid: float | None = None
    chunk: int | None = None
    max_length: int | None = None
    max_trim: int = 1
    dtype: str = "float32"

    def arrays(self):
        """Queries, keys and values of the new tokens, learned sinks, and a cache."""
        rng = np.random.default_rng(0)
        (heads, kv_heads), (dim, value_dim) = self.heads, self.dims

        def normal(tokens, *dims):
            return jnp.asarray(rng.standard_normal((self.batch, tokens, *dims)), self.dtype)

        q, k, v = (
            normal(self.tokens, *dims)
            for dims in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
        )
        sink = jnp.asarray(rng.standard_normal(heads), jnp.float32) if self.learned else None
        prompt = normal(self.prompt, kv_heads, dim), normal(self.prompt, kv_heads, value_dim)
        begins = np.arange(self.batch)[:, None] * 5
        cache = rsj.prefill_cache(
            *prompt,
            segment_ids=np.where(np.arange(self.prompt) >= begins, 0, -1),
            window_size=self.window,
            num_sink_tokens=self.sinks,
            max_length=self.max_length,
            max_trim=self.max_trim,
        )
        return (q, k, v, sink), cache

    def run(self, implementation, gradients):
        """(output, cache), and gradients of q, k, v, learned sinks and cached keys if asked to."""
        arrays, cache = self.arrays()
        valid = None
        if self.valid is not None:
            valid = np.random.default_rng(1).random((self.batch, self.tokens)) < self.valid

        def attend(q, k, v, sink, cached_keys):
            return rsj.decode_attention(
                q, k, v, dataclasses.replace(cache, key=cached_keys),
                window_size=self.window, num_sink_tokens=self.sinks, logits_soft_cap=self.cap,
                sink_logits=sink, valid=valid, attention_chunk_size=self.chunk,
                implementation=implementation,
            )  # fmt: skip

        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        def attend_and_pull(*arrays):
            if not gradients:
                return attend(*arrays)
            out, pull, after = jax.vjp(attend, *arrays, has_aux=True)
            dout = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
            return (out, after), pull(dout)

        return attend_and_pull(*arrays, cache.key)


STEPS = {
    "chunk": Step(70, 40, 50, learned=True),
    "chunk_sinks_padding": Step(65, 30, 12, sinks=4, cap=3.0, valid=0.7, max_trim=3),
    "chunk_without_window": Step(64, None, 40, heads=(4, 2), max_length=110, valid=0.8),
    "chunk_by_chunks": Step(64, 31, 70, chunk=32, dims=(16, 32)),
    # Slots before the sequence lie in the window, in the same tile of keys as tokens do.
    "chunk_of_one_row_after_few": Step(64, 130, 20, batch=1),
    "one": Step(1, 40, 50, dtype="bfloat16"),
    "one_sinks": Step(1, 30, 40, sinks=4, heads=(6, 2), dims=(48, 16), cap=3.0, learned=True),
    "one_after_few": Step(1, 30, 8, sinks=6, valid=0.6, max_trim=4, batch=4),
    "one_by_chunks": Step(1, 31, 70, chunk=32),
    "one_without_window": Step(1, None, 40, max_length=60),
}


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        ("chunk_sinks_padding", False),
        ("chunk_of_one_row_after_few", False),
        ("one_after_few", False),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in STEPS),
    ],
)
def test_kernels_and_products_agree(name, gradients):
    step = STEPS[name]
    if step.tokens == 1:
        step = dataclasses.replace(step, dtype="bfloat16")
    (q, _, v, _), cache = step.arrays()
    spec = _decode_chunk.spec_for(step.window, step.sinks, 1.0, step.cap)
    assert _decode_chunk.kernels_for("triton", spec, q, v, cache.num_slots) == "triton"
    found, expected = (step.run(name, gradients) for name in ("triton", "xla"))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = (np.asarray(each, np.float64) for each in (x, y))
        scale = max(1, np.nanmax(np.abs(y), initial=0))
        np.testing.assert_allclose(x, y, atol=4 * TOLERANCE[step.dtype][0] * scale, rtol=0)


def test_products_where_no_kernel_is_for_this():
    step = STEPS["chunk"]
    (q, _, v, _), _ = step.arrays()
    spec = _decode_chunk.spec_for(step.window, step.sinks, 1.0, None)

    def kernels(tokens, implementation="triton", slots=41, dtype="bfloat16"):
        arrays = (x[:, :tokens].astype(dtype) for x in (q, v))
        return _decode_chunk.kernels_for(implementation, spec, *arrays, slots)

    assert kernels(64) == kernels(1) == "triton"
    assert kernels(63) is kernels(64, "xla") is kernels(1, dtype="float32") is None
    assert kernels(1, slots=2**26) is None  # more elements than 32 bits count
    with jax.set_mesh(make_mesh(data=2)):
        assert kernels(64) is kernels(1) is None
