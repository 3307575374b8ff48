"""Sweeps over chunk, window, devices, documents, sinks, heads and dtypes against the oracle.

Default: most odd cases by one route, and two random cases. Slow (`pytest -m slow -n 2`): every
odd case by all its routes and 24 random ones. A failure prints the case and its route: run
`tests.helpers.routes.check(Case(...), route)` again, or `pytest -m slow -k random-17`.
"""

import random

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.helpers.cases import cases, random_case
from tests.helpers.odd_cases import ODD
from tests.helpers.routes import check, route_of, routes_of

INTERPRETED = {"triton"}  # on CPU, and only without check_vma


def supported(route, implementation):
    """Whether JAX's interpret mode allows the route."""
    interpreted = implementation in INTERPRETED and jax.default_backend() == "cpu"
    return not (interpreted and route in ("shard", "shard_tuple"))


# These compile longest and differ least from others; the long sweep has them all.
LONG = {
    "window_beyond_length",
    "rows_one_all_padding",
    "packed_single_tokens",
    "sinks_began_devices_ago",
    "sinks_straddle_edge",
}


@pytest.mark.parametrize("name", [name for name in ODD if name not in LONG])
def test_odd_case(name, implementation):
    case = ODD[name]
    route = route_of(case)
    check(case, route if supported(route, implementation) else "shard_novma", implementation)


# No shrinking: each step would compile, and the printed case is small already.
@settings(
    max_examples=2,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def check_some(implementation, case):
    """Property: whatever the case, one of its routes equals the oracle."""
    route = route_of(case)
    check(case, route if supported(route, implementation) else "shard_novma", implementation)


def test_some_random_cases(implementation):
    check_some(implementation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name in ODD for route in routes_of(ODD[name])]
)
def test_odd_case_by_every_route(name, route, implementation):
    if not supported(route, implementation):
        pytest.skip("JAX's interpret mode needs check_vma=False")
    check(ODD[name], route, implementation, optimize=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24), ids=lambda seed: f"random-{seed}")
def test_random_case(seed, implementation):
    case = random_case(random.Random(seed))
    route = route_of(case)
    check(case, route if supported(route, implementation) else "shard_novma", implementation)
