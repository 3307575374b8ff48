"""NaN and inf in padding rows reach no real row, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import ring_swa_jax as rsj
from pallas_kernels._tile_ranges import with_padding
from pallas_kernels._triton import backward_sinks, kernels
from pallas_kernels._triton.tiles import TritonPlan, TritonTiles

# Padding before, between and after documents, and across the edge of two chunks of 48.
IDS = np.repeat([-1, 0, -1, 1, -1, 2, 3, -1], [3, 14, 5, 20, 9, 25, 4, 16])
SETTINGS = {
    "window": dict(window_size=9),
    "causal": dict(window_size=None),
    "sinks": dict(window_size=5, num_sink_tokens=3),
    "all_to_all": dict(window_size=None, exchange="all_to_all"),
    "ring": dict(window_size=None, exchange="ring"),
    "both_sides": dict(window_size=(5, 9), num_sink_tokens=3),
    "full_ring": dict(window_size=(None, None), exchange="ring"),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Triton tiles so small that some hold padding and some do not."""
    tiles = TritonTiles(16, 16, 4, 2)
    plan = TritonPlan(tiles, tiles, tiles, sinks=tiles)
    monkeypatch.setattr(kernels, "triton_plan", lambda *_: plan)
    monkeypatch.setattr(backward_sinks, "SINK_CHUNK", 16)


def arrays():
    """q, k, v and the cotangent, all finite."""
    shapes = ((2, 96, 4, 16), (2, 96, 2, 16), (2, 96, 2, 16), (2, 96, 4, 16))
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def program(ids, implementation, devices, **settings):
    """A function of q, k, v and the cotangent: output, gradients of q, k, v and learned sinks."""
    mesh = jax.make_mesh((devices,), ("seq",), axis_types=(AxisType.Auto,))

    @jax.jit
    def run(q, k, v, dout):
        def attend(q, k, v, sink_logits):
            return rsj.ring_attention(
                q, k, v, segment_ids=ids, sink_logits=sink_logits, mesh=mesh,
                implementation=implementation, **settings,
            )  # fmt: skip

        out, pull = jax.vjp(attend, q, k, v, jnp.array([0.5, 0.0, -1.0, 2.0]))
        return out, *pull(dout)

    return run


CASES = [("xla", 2, "sinks"), ("xla", 2, "all_to_all"), ("xla", 2, "ring")]
SLOW = [("xla", 1, "causal"), ("triton", 1, "causal"), ("triton", 2, "sinks")]
SLOW += [("xla", 2, "both_sides"), ("triton", 1, "both_sides"), ("xla", 2, "full_ring")]
SLOW += [("xla", 1, "sinks"), ("xla", 2, "window"), ("triton", 1, "sinks"), ("triton", 2, "window")]


@pytest.mark.parametrize(
    ("implementation", "devices", "settings"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_padding_counts_as_zeros(implementation, devices, settings):
    """In the second row of the batch other tokens are padding than in the first."""
    ids = jnp.array([IDS, np.roll(IDS, 7)], jnp.int32)
    padding = np.asarray(ids < 0)
    with_nan = []
    for n, x in enumerate(arrays()):
        fill = [jnp.nan, jnp.inf, -jnp.inf, jnp.nan][n]
        with_nan.append(jnp.where(padding[..., None, None], fill, x))
    run = program(ids, implementation, devices, **SETTINGS[settings])
    got, want = ([np.asarray(x) for x in run(*inputs)] for inputs in (with_nan, arrays()))
    for x, y in zip(got, want, strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(x, y)
    for x in got[:4]:
        assert not x[padding].any()
        assert x[~padding].any()


def test_plan_says_which_tiles_have_padding():
    start = jnp.where(IDS < 0, jnp.arange(96) + 1, 0).astype(jnp.int32)[None]
    begin, end = (jnp.array([x], jnp.int32) for x in ([0, 0, 1, 2, 3, 2], [0, 1, 3, 3, 4, 6]))
    plan = with_padding(jnp.zeros((1, 6, 2), jnp.int32), start, begin, end, 16)
    right = [(IDS[16 * b : 16 * e] < 0).any() for b, e in zip(begin[0], end[0], strict=True)]
    assert plan[0, :, 2].tolist() == right and True in right and False in right
