"""What the benchmark of whole models computes and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from benchmarks import _model_profile, model_compile
from benchmarks._model_contenders import ALL_GATHER, ALL_TO_ALL, CONTENDERS, OURS
from benchmarks._model_decoder import Decoder
from benchmarks._model_loss import mean_cross_entropy
from benchmarks._model_profile import Kernel
from benchmarks._model_sizes import MODELS, busiest_pairs, tiny
from benchmarks._model_step import Training
from benchmarks._ring_shapes import LONG_SHAPES


def mesh(data, seq):
    """Of CPU devices."""
    return jax.make_mesh(
        (data, seq), ("data", "seq"), (AxisType.Auto,) * 2, devices=jax.devices()[: data * seq]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axes"),
    [("gemma3-1b", (1, 4)), ("mistral-7b", (1, 4)), ("gpt-oss", (2, 2))],
)
def test_contenders_compute_the_same_model(name, axes):
    training = Training(Decoder(tiny(MODELS[name]), "float32"), mesh(*axes))
    parameters, _ = training.compile_init()()
    words = training.words(2, 64)
    losses, gradients = {}, {}
    for contender in CONTENDERS:
        step = training.lower_gradients(contender, 2, 64).compile()
        losses[contender], found = step.call(parameters, *words)
        gradients[contender] = jax.tree.map(np.asarray, found)
    for contender in (ALL_GATHER, ALL_TO_ALL):
        np.testing.assert_allclose(losses[contender], losses[OURS], rtol=1e-6)
        for leaf, expected in zip(
            jax.tree.leaves(gradients[contender]), jax.tree.leaves(gradients[OURS]), strict=True
        ):
            assert np.linalg.norm(leaf - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.slow
def test_loss_in_chunks_of_words():
    keys = jax.random.split(jax.random.key(0), 3)
    x, table = jax.random.normal(keys[0], (2, 8, 16)), jax.random.normal(keys[1], (32, 16))
    targets = jax.random.randint(keys[2], (2, 8), 0, 32)

    def dense(x, table):
        logits = jnp.einsum("bse,ve->bsv", x, table)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    with jax.set_mesh(mesh(1, 2)):
        found = jax.jit(
            jax.value_and_grad(lambda *x: mean_cross_entropy(*x, targets, 8), argnums=(0, 1))
        )(x, table)
    expected = jax.value_and_grad(dense, argnums=(0, 1))(x, table)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


def test_pairs_of_the_busiest_device():
    full = MODELS["gpt-oss"].shape(1, 1, 4096)
    assert busiest_pairs(OURS, full, 4) == busiest_pairs(ALL_TO_ALL, full, 4) == full.pairs() / 4
    assert busiest_pairs(ALL_GATHER, full, 4) == sum(range(3073, 4097))
    window = MODELS["gpt-oss"].shape(0, 1, 4096)
    assert busiest_pairs(OURS, window, 4) == 1024 * 128
    assert busiest_pairs(ALL_GATHER, window, 4) == 1024 * 128 + 127 * 128 // 2
    halo, heads = (LONG_SHAPES[name] for name in ("window-8k", "window-12k"))
    assert busiest_pairs(OURS, halo, 4) == 16384 * 8192
    assert busiest_pairs(OURS, heads, 4) == heads.pairs() / 4


def test_exposed_collectives():
    kernels = [
        Kernel("nvjet_gemm", 0, 4000),
        Kernel("ncclDevKernel_AllGather", 3000, 6000),
        Kernel("ring_swa_forward", 7000, 9000),
    ]
    found = _model_profile.of_device(kernels)
    assert found["matrix products"] == 4
    assert found["attention, ours"] == 2
    assert found["collectives"] == 3
    assert found["collectives, exposed"] == 2
    assert found["idle"] == 1
    assert found["wall"] == 9


def test_moved_bytes_count_loops():
    hlo = """HloModule step
%body.1 (p: f32[4]) -> f32[4] {
  %g = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), dimensions={0}
  %d = bf16[8,8]{1,0} all-gather-done(%g)
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4] while(%p), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %s = ((f32[8]{0}, /*index=1*/bf16[8]{0}), (f32[8]{0}, bf16[8]{0})) all-reduce-start(%w)
  ROOT %r = f32[2,8]{1,0} reduce-scatter(%w), dimensions={0}
}
"""
    moved = {"all-gather": 3 * 128, "reduce-scatter": 4 * 64, "all-reduce": 48}
    assert model_compile.moved_bytes(hlo, 4) == moved
