"""Windows that reach past the query: every exchange and layout beside the oracle."""

import dataclasses
import random

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ring_swa_jax as rsj
from pallas_kernels._xla.kernels import XlaKernels
from ring_swa_jax.nnx import RingSlidingWindowAttention, attention_fn
from tests.helpers import exchanges
from tests.helpers.cases import Case, random_case
from tests.helpers.exchanges import per_shard, whole_arrays
from tests.helpers.routes import check

FEATURES = dict(heads=(4, 2), dims=(16, 32), learned=True, softcap=2.0)
# Documents that end on the edge of a chunk of 8, one token before it and one after it.
EDGES = ((8, 9, -2, 5, 8), (7, 25))
CASES = {
    "halo": ("halo", Case(8, 4, (5, 3), 2, batch=2, **FEATURES)),
    "halo_documents": ("halo", Case(8, 4, (6, 9), 3, EDGES, batch=2, heads=(4, 2))),
    "hops": ("halo", Case(5, 5, (7, 12), documents=((11, 0, 3, 9, -2),), packed=True)),
    "all_to_all": ("all_to_all", Case(8, 4, (3, 40), 2, EDGES, batch=2, heads=(4, 2))),
    "ring": ("ring", Case(8, 4, (None, None), documents=EDGES, batch=2, learned=True)),
    "ring_one_bound": ("ring", Case(7, 3, (4, None), 3, batch=2, heads=(3, 1))),
    "one_device": (None, Case(40, 1, (None, 6), documents=((13, -4, 23),))),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_oracle_computes(name):
    exchange, case = CASES[name]
    whole = case.documents is None or case.packed
    check(case, per_shard(exchange) if whole else whole_arrays(exchange))


@pytest.mark.parametrize(
    "name", [pytest.param("halo_documents", marks=pytest.mark.slow), "one_device"]
)
def test_in_triton(name):
    exchange, case = CASES[name]
    check(case, whole_arrays(exchange), "triton")


@pytest.mark.parametrize("window", [(3, 5), (None, None)])
def test_in_dual_chunk_order(window):
    check(Case(8, 2, window, documents=((5, 11),)), whole_arrays(None, "dual_chunk"))


def test_rows_that_see_no_halo_go_first(monkeypatch):
    """As where a launch of these rows hides the transfers."""
    monkeypatch.setattr(XlaKernels, "prefers_fused_halo_forward", False)
    check(Case(24, 3, (3, 4), 2, ((23, 26, -3, 20),), **FEATURES), whole_arrays("halo"))


@pytest.mark.parametrize("devices", [1, 3])
def test_rows_behind_the_last_whole_tile(devices, monkeypatch):
    """On one device no launch may be left out for want of a halo."""
    monkeypatch.setattr(XlaKernels, "prefers_fused_halo_forward", False)
    monkeypatch.setattr(XlaKernels, "query_tile_rows", lambda *_: 16)
    check(Case(41, devices, (3, 4)), whole_arrays(None))


def two_sided(rng):
    """A random case with a window to both sides, and an exchange that it can take."""
    case = random_case(rng)
    near = [0, 1, case.chunk - 1, case.chunk, case.chunk + 1, 2 * case.chunk]
    bounds = [*near, rng.randint(0, case.length), case.length - 1, case.length + 5, None]
    window = (rng.choice(bounds), rng.choice(bounds))
    lacks_bound = any(bound is None or bound >= case.length - 1 for bound in window)
    known = [name for name, fits in (
        ("halo", None not in window),
        ("all_to_all", case.heads[0] % case.devices == 0),
        ("ring", lacks_bound),
        (None, True),
    ) if fits]  # fmt: skip
    return dataclasses.replace(case, window=window), rng.choice(known)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "implementation"),
    [*((seed, "xla") for seed in range(12)), *((seed, "triton") for seed in range(12, 16))],
)
def test_random_cases(seed, implementation):
    case, exchange = two_sided(random.Random(seed))
    interpreted = implementation == "triton"
    case = dataclasses.replace(case, dims=(16, 32)) if interpreted else case
    whole = case.documents is None or case.packed
    route = per_shard(exchange, check_vma=not interpreted) if whole else whole_arrays(exchange)
    check(case, route, implementation)


def test_a_bound_over_the_whole_sequence_is_none():
    (q, k, v, _), _ = Case(12, 1, None).arrays()
    for near, far in (((11, 3), (None, 3)), ((4, 11), (4, None)), ((99, 99), (None, None))):
        first, second = (rsj.ring_attention(q, k, v, window_size=w, seq_axis=None)
                         for w in (near, far))  # fmt: skip
        assert (first == second).all()


def test_modules_take_pairs():
    case = Case(24, 1, (3, 2))
    layer = RingSlidingWindowAttention(
        2, 16, window_size=(3, 2), rope=None, seq_axis=None, rngs=nnx.Rngs(0)
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 24, 16)), jnp.float32)
    changed = layer(x.at[:, 12].add(1.0)) != layer(x)
    seen = np.flatnonzero(np.asarray(changed).any((0, 2)))
    assert (seen == np.flatnonzero(case.mask()[0][:, 12])).all()


def test_flax_attention_without_a_causal_mask():
    (q, k, v, _), _ = Case(24, 1, None, heads=(2, 2)).arrays()
    attend = attention_fn(window_size=(4, 4), seq_axis=None)
    expected = rsj.reference_attention(q, k, v, window_size=(4, 4))
    np.testing.assert_allclose(attend(q, k, v), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [
    lambda: rsj.init_cache(1, 2, 16, window_size=(4, 1), dtype=jnp.float32),
    lambda: RingSlidingWindowAttention(
        2, 16, window_size=(4, 1), rope=None, seq_axis=None, rngs=nnx.Rngs(0)
    ).init_cache(1),
])  # fmt: skip
def test_caches_take_no_keys_after_the_query(make):
    with pytest.raises(ValueError, match=r"must not reach past the query.*: write 4 or \(4, 0\)"):
        make()


def test_exchange_that_does_not_fit():
    case = Case(4, 2, (3, None))
    with pytest.raises(ValueError, match=r"window_size=\(3, None\) reaches all keys on a side"):
        exchanges.check(case, per_shard("halo"))
    with pytest.raises(ValueError, match=r"window_size=\(3, 2\) ends within the sequence"):
        exchanges.check(dataclasses.replace(case, window=(3, 2)), per_shard("ring"))
