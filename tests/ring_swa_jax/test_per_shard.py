"""The four per-shard functions inside the caller's own shard_map, and alone on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj
from tests.helpers.cases import Case
from tests.helpers.routes import (
    check,
    compare,
    make_mesh,
    over_ring,
    per_shard,
    run,
    shard_map,
)

DOCUMENTS = ((3, 6, 0, 12, -3),)
KINDS = {
    "sliding": Case(6, 4, 4, batch=2, heads=(4, 2), learned=True),
    "streaming": Case(6, 4, 8, sinks=2, batch=2, heads=(4, 2), learned=True),
    "sliding_varlen": Case(6, 4, 4, documents=DOCUMENTS, packed=True, learned=True),
    "streaming_varlen": Case(6, 4, 8, 2, DOCUMENTS, packed=True, learned=True),
}
SLOW = ("sliding", "sliding_varlen")  # the others do more


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS]
)
def test_ring_sums_gradients_over_devices_once(kind, implementation, check_vma):
    check(KINDS[kind], over_ring(check_vma), implementation)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_sequence_here(kind, implementation):
    case = dataclasses.replace(KINDS[kind], chunk=KINDS[kind].length, devices=1)
    check(case, "one_device", implementation)


@pytest.mark.parametrize("documents", [pytest.param(None, marks=pytest.mark.slow), ((5, 20, -3),)])
def test_sequence_over_two_axes(documents, implementation):
    case = Case(7, 4, 9, 3, documents, documents is not None, heads=(4, 2), learned=True)
    if implementation == "triton":
        pytest.skip("over_tuple uses check_vma=True")
    check(case, "shard_tuple", implementation)


def test_batch_and_heads_sharded_too(implementation, check_vma):
    case = Case(9, 2, 7, sinks=2, batch=2, heads=(4, 2), learned=True)

    def build(case, implementation):
        mesh = make_mesh(data=2, seq=2, model=2)
        local = per_shard(case, "seq", implementation)
        return shard_map(local, mesh, "seq", check_vma=check_vma, batch="data", head="model"), mesh

    check(case, build, implementation)


@pytest.mark.slow
def test_without_jit(implementation):
    check(Case(5, 3, 6, 2, learned=True), over_ring(False), implementation, jit=False)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_low_precision_over_hops(dtype, implementation):
    case = Case(16, 4, 40, heads=(4, 2), dims=(32, 16), dtype=dtype, batch=2)
    check(case, over_ring(False), implementation)


def test_sink_gradient_keeps_its_own_dtype(implementation):
    case = Case(6, 1, 3, learned=True)
    (q, k, v, sink), dout = case.arrays()
    attend = per_shard(case, None, implementation)
    sink = sink.astype(jnp.bfloat16)

    def loss(sink):
        return (attend(q, k, v, sink, None) * dout).sum()

    got = jax.jit(jax.grad(loss))(sink)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), case.expected.dsink, rtol=0.1, atol=0.05)


def test_streaming_default_is_one_sink_token(implementation):
    case = Case(12, 1, 2, sinks=1)
    (q, k, v, _), _ = case.arrays()
    options = dict(window_size=2, implementation=implementation)
    got = rsj.ring_streaming_llm_attn(q, k, v, **options)
    np.testing.assert_allclose(got, case.expected.out, atol=1e-5)
    cu = jnp.array([0, 12], jnp.int32)
    packed = rsj.ring_streaming_llm_attn_varlen(q[0], k[0], v[0], cu_seqlens=cu, **options)
    np.testing.assert_allclose(packed, case.expected.out[0], atol=1e-5)


@pytest.mark.slow
def test_number_of_devices_does_not_change_the_result(implementation):
    case = Case(24, 1, 10, 2, learned=True, heads=(4, 2))
    for devices in (2, 3, 8):
        split = dataclasses.replace(case, chunk=24 // devices, devices=devices)
        compare(run(split, over_ring(False), implementation), case.expected, "float32", split)


def test_none_chooses_an_implementation():
    check(Case(5, 2, 3), over_ring(False), None)
