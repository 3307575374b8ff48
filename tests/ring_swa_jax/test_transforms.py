"""vmap (outside and inside of grad), lax.scan over layers, and remat by names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers.cases import Case
from tests.helpers.routes import (
    ROUTES,
    make_mesh,
    over_ring,
    per_shard,
    with_gradients,
)
from tests.helpers.twins import PACKED, WHOLE, compare_each, stacked, twins


@pytest.mark.parametrize(
    "case", [pytest.param(WHOLE, marks=pytest.mark.slow), PACKED], ids=["whole", "packed"]
)
def test_vmap_of_gradients(case, implementation):
    pair = twins(case)
    function, _ = over_ring(False)(case, implementation)
    compare_each(jax.jit(jax.vmap(with_gradients(function)))(*stacked(pair)), pair)


@pytest.mark.parametrize("case", [WHOLE, PACKED], ids=["whole", "packed"])
def test_gradients_of_vmap_on_one_device(case, implementation):
    case = dataclasses.replace(case, chunk=20, devices=1)
    pair = twins(case)
    function = per_shard(case, None, implementation)
    mapped = lambda *x: jax.vmap(function)(*x)  # noqa: E731
    compare_each(jax.jit(with_gradients(mapped))(*stacked(pair)), pair)


def test_vmap_inside_shard_map(implementation, check_vma):
    pair = twins(WHOLE)
    local = per_shard(WHOLE, "seq", implementation)
    spec = P(None, None, "seq")
    function = jax.shard_map(
        jax.vmap(local),
        mesh=make_mesh(seq=4),
        in_specs=(spec, spec, spec, P(), P()),
        out_specs=spec,
        check_vma=check_vma,
    )
    compare_each(jax.jit(with_gradients(function))(*stacked(pair)), pair)


def test_vmap_of_ring_attention(implementation):
    pair = twins(Case(5, 4, 7, 2, ((4, 7, 9), (20,)), batch=2, learned=True))
    function, mesh = ROUTES["global"](pair[0], implementation)
    with jax.set_mesh(mesh):
        compare_each(jax.jit(jax.vmap(with_gradients(function)))(*stacked(pair)), pair)


@pytest.mark.slow
def test_vmap_with_shared_keys_and_sinks(implementation):
    first = WHOLE
    (q, k, v, sink), dout = first.arrays()
    q = jnp.stack([q, q + 1])
    function, _ = over_ring(False)(first, implementation)
    one = lambda q, k, v, s: function(q, k, v, s, None)  # noqa: E731

    @jax.jit
    def gradients(attend, q, k, v, sink, dout):
        out, pull = jax.vjp(attend, q, k, v, sink)
        return out, *pull(dout)

    mapped = jax.tree_util.Partial(jax.vmap(one, (0, None, None, None)))
    got = gradients(mapped, q, k, v, sink, jnp.stack([dout, dout]))
    apart = [gradients(jax.tree_util.Partial(one), x, k, v, sink, dout) for x in q]
    want = jax.tree.map(lambda *x: jnp.stack(x), *apart)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):  # out, dq, dk, dv, dsink
        np.testing.assert_allclose(a, b if i < 2 else b.sum(0), atol=2e-5)


LAYERS, WIDTH = 3, 16
POLICIES = {
    "context": jax.checkpoint_policies.save_only_these_names("context"),
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}


def network(attend, policy):
    """loss(weights, x): layers of y = x + attend(...) under lax.scan, each one in remat."""

    def layer(x, weight):
        q, k, v = (jnp.einsum("bsnh,hd->bsnd", x, w) for w in weight)
        return x + attend(q, k[:, :, :2], v[:, :, :2]), None

    if policy:
        layer = jax.checkpoint(layer, policy=POLICIES[policy])
    return lambda weights, x: (jax.lax.scan(layer, x, weights)[0] ** 2).mean()


def weights_and_input():
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal((LAYERS, 3, WIDTH, WIDTH)) / 4, jnp.float32)
    return weights, jnp.asarray(rng.standard_normal((2, 24, 4, WIDTH)), jnp.float32)


OPTIONS = dict(window_size=7, num_sink_tokens=2)


@pytest.mark.parametrize("policy", [pytest.param(None, marks=pytest.mark.slow), "context"])
def test_scan_over_layers(policy, implementation):
    def attend(q, k, v):
        return rsj.ring_attention(q, k, v, implementation=implementation, **OPTIONS)

    def reference(q, k, v):
        return rsj.reference_attention(q, k, v, **OPTIONS)

    arguments = weights_and_input()
    want = jax.jit(jax.value_and_grad(network(reference, None), (0, 1)))(*arguments)
    with jax.set_mesh(make_mesh(seq=4)):
        got = jax.jit(jax.value_and_grad(network(attend, policy), (0, 1)))(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert np.abs(b).max() > 1e-3


def test_saving_context_spares_the_forward_kernels(implementation):
    """Under scan (else CSE hides it) the backward pass repeats no attention, only projections."""

    def attend(q, k, v):
        return rsj.ring_attention(q, k, v, seq_axis=None, implementation=implementation, **OPTIONS)

    def work(policy):
        program = jax.jit(jax.grad(network(attend, policy))).lower(*weights_and_input())
        return program.compile().as_text().count(" exponential(")

    assert 0 < work("everything") == work("context") < work("nothing")
