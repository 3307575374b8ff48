"""What moves in layers without a window, how often, and what is kept under remat.

Bytes of a device in float32, with chunks of T tokens, B rows, P devices, N and K heads and
R = lcm(K, P):

* all_to_all, forward: q B T N H, keys and values B T R (H + Hv), out B T N Hv, and the
  log-sum-exp B T N, each times 4; backward: dout, the log-sum-exp, rowsum(out * dout), dq, dk
  and dv alike;
* ring, forward: keys and values B T K (H + Hv) before the loop and in each of its P - 2 rounds;
  backward: the same, and their gradients as often and twice more. Between mirror images, half as
  many tokens: q, keys and values, out and the log-sum-exp forward; q, keys and values, dout, the
  log-sum-exp and rowsum(out * dout), dq and the gradients of keys and values backward.
"""

import collections
import functools
import math

import jax
import numpy as np
import pytest

import ring_swa_jax as rsj
from tests.helpers.cases import Case
from tests.helpers.exchanges import per_shard
from tests.helpers.ring_programs import programs
from tests.helpers.routes import make_mesh

T, P = 8, 4


def moved(found, kind, *, in_loop=False):
    """Bytes of one kind of collective."""
    return sum(x.bytes for x in found if x.kind == kind and x.in_loop == in_loop)


@pytest.mark.parametrize("kv_heads", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_all_to_all_moves_what_the_formula_says(kv_heads):
    case = Case(T, P, None, batch=2, heads=(8, kv_heads), dims=(16, 32))
    forward, backward = programs(case, per_shard("all_to_all", check_vma=False), "xla")
    rows, repeated = case.batch * T * 4, math.lcm(kv_heads, P)
    query, out, sums = 8 * 16 * rows, 8 * 32 * rows, 8 * rows
    keys = repeated * (16 + 32) * rows
    assert {x.kind for x in forward + backward} == {"all-to-all"}
    assert moved(forward, "all-to-all") == query + keys + out + sums
    assert moved(backward, "all-to-all") == query + keys + out + 2 * sums


@pytest.mark.parametrize(
    ("dtype", "messages"),
    [
        ("float32", (2, 2)),
        # The log-sum-exp and rowsum(out * dout) are in float32.
        ("bfloat16", (3, 3)),
    ],
)
def test_beside_plain_jax_the_arrays_of_a_dtype_are_one_message(dtype, messages):
    """With two key/value heads on a device, where kernels of a GPU have two launches."""
    case = Case(T, P, None, heads=(8, 8), dtype=dtype)
    found = programs(case, per_shard("all_to_all", check_vma=False), "xla")
    assert tuple(map(len, found)) == messages


def test_a_ring_moves_what_the_formula_says():
    case = Case(T, P, None, batch=2, heads=(4, 2), dims=(16, 32))
    found = programs(case, per_shard("ring", check_vma=False), "xla")
    keys = case.batch * T * 2 * (16 + 32) * 4
    ring = {(device, (device + 1) % P) for device in range(P)}
    forward, backward = ([x for x in some if set(x.pairs) == ring] for some in found)
    permute = "collective-permute"
    assert [moved(x, permute) for x in (forward, backward)] == [keys, 3 * keys]
    assert [moved(x, permute, in_loop=True) for x in (forward, backward)] == [keys, 2 * keys]
    mirror = {(device, P - 1 - device) for device in range(P)}
    forward, backward = ([x for x in some if set(x.pairs) == mirror] for some in found)
    rows = case.batch * T // 2 * 4
    query, out, sums = 4 * 16 * rows, 4 * 32 * rows, 4 * rows
    assert moved(forward, permute) == query + keys // 2 + out + sums
    assert moved(backward, permute) == query + keys // 2 + out + 2 * sums + query + keys // 2
    assert all(set(x.pairs) in (ring, mirror) for some in found for x in some)
    assert {x.kind for some in found for x in some} == {permute}


def equations(program):
    """How often each primitive stands in a jaxpr, and each Pallas kernel by its name."""
    count = collections.Counter()

    def visit(value):
        if isinstance(value, tuple | list):
            for item in value:
                visit(item)
        elif hasattr(value, "eqns"):
            for equation in value.eqns:
                name = equation.primitive.name
                count[equation.params["name"] if name == "pallas_call" else name] += 1
                if name != "pallas_call":
                    visit(list(equation.params.values()))
        elif hasattr(value, "jaxpr"):
            visit(value.jaxpr)

    visit(program)
    return count


def counts(exchange, policy):
    """Of the gradients of a layer that is recomputed, but for what the policy saves."""
    mesh = make_mesh(seq=2)
    attend = functools.partial(
        rsj.ring_attention, window_size=None, mesh=mesh, exchange=exchange, implementation="triton"
    )
    layer = jax.checkpoint(attend, policy=policy)
    x = np.zeros((1, 32, 2, 16), np.float32)
    gradients = jax.grad(lambda *x: (layer(*x) ** 2).sum(), (0, 1, 2))
    return equations(jax.make_jaxpr(gradients)(x, x, x))


@pytest.mark.parametrize("exchange", ["all_to_all", "ring"])
def test_saving_context_runs_the_forward_kernels_once(exchange):
    context = jax.checkpoint_policies.save_only_these_names("context")
    saved = counts(exchange, context)
    everything = counts(exchange, jax.checkpoint_policies.everything_saveable)
    nothing = counts(exchange, jax.checkpoint_policies.nothing_saveable)
    launches = everything["ring_swa_forward"]
    assert saved["ring_swa_forward"] == launches > 0
    assert nothing["ring_swa_forward"] == 2 * launches
    if exchange == "all_to_all":
        # q, k, v; out and log-sum-exp; dout, log-sum-exp with rowsum(out * dout), dq, dk and dv
        # backward; q, k, v again.
        assert everything["all_to_all"] == 5 + 5
        assert saved["all_to_all"] == everything["all_to_all"] + 3
        # Nobody needs the log-sum-exp of the first time.
        assert nothing["all_to_all"] == everything["all_to_all"] + 5 - 1


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["all_to_all", "ring"])
def test_memory_of_a_device_does_not_grow_with_the_devices(exchange):
    """Of forward and backward, with as many tokens on each of 4 and of 8 devices."""
    found = []
    for devices in (4, 8):
        mesh = make_mesh(seq=devices)
        sharding = jax.NamedSharding(mesh, jax.P(None, "seq"))
        x = jax.ShapeDtypeStruct((1, 256 * devices, 16, 16), np.float32, sharding=sharding)
        attend = functools.partial(
            rsj.ring_attention, window_size=None, mesh=mesh, exchange=exchange
        )
        gradients = jax.grad(lambda *x, f=attend: (f(*x) ** 2).sum(), (0, 1, 2))
        options = {"xla_backend_optimization_level": 0}
        program = jax.jit(gradients).lower(x, x, x).compile(compiler_options=options)
        found.append(program.memory_analysis().temp_size_in_bytes)
    few, many = found
    assert many <= 1.1 * few
