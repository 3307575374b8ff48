"""Layers without a window, compiled for 4 and for 64 Hopper GPUs with as many tokens on each.

Of the forward pass, and of both passes in one program: the messages and the memory of a device are
those of docs/cost.md and docs/how_it_works.md, and the program does not grow with the devices.
Deselected by default, as `test_compile.py`: `pytest -m aot`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers import compile_target
from tests.helpers.device_share import share_of

pytestmark = pytest.mark.aot

DEVICES = (4, 64)
# LLVM's level alone: it saves a fifth of the time, and moves and keeps no bytes.
OPTIONS = compile_target.OPTIONS | {"xla_backend_optimization_level": 0}
BYTES, SUM_BYTES = 2, 4  # of bfloat16; of the log-sum-exp and other sums


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's exchange, the tokens of a device, and its heads."""

    exchange: str
    tokens: int
    heads: int
    kv_heads: int
    dim: int = 64

    @property
    def sizes(self):
        """Numbers for each token: of queries and as many of outputs, and of keys and values."""
        return self.heads * self.dim, self.kv_heads * 2 * self.dim

    def repeated(self, devices):
        """How often all_to_all repeats each key/value head, and in how many launches."""
        heads = math.lcm(self.kv_heads, devices)
        return heads // self.kv_heads, math.gcd(heads // devices, 2)


HEADS = Layer("all_to_all", 256, heads=128, kv_heads=128)
REPEATED_HEADS = Layer("all_to_all", 256, heads=128, kv_heads=2)
RING = Layer("ring", 2048, heads=8, kv_heads=2)


def programs(layer, devices, implementation):
    """[forward, both passes], each a Share."""
    mesh = compile_target.mesh(devices)
    sharding = NamedSharding(mesh, P(None, "seq"))
    attend = functools.partial(
        rsj.ring_attention, window_size=None, exchange=layer.exchange, implementation=implementation
    )

    def array(heads):
        dims = (1, devices * layer.tokens, heads, layer.dim)
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=sharding)

    def both(query, key, value, dout):
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(dout)

    query, key = array(layer.heads), array(layer.kv_heads)
    found = []
    with jax.set_mesh(mesh):
        for function, arguments in ((attend, (query, key, key)), (both, (query, key, key, query))):
            lowered = jax.jit(function).lower(*arguments)
            found.append(share_of(lowered.compile(compiler_options=OPTIONS)))
    return found


def moved(share, pairs=(), *, in_loop=False):
    """Bytes of the messages between these pairs of devices."""
    found = [x for x in share.collectives if x.in_loop == in_loop and set(x.pairs) == set(pairs)]
    return sum(x.bytes for x in found)


def check_all_to_all_moves(layer, devices, forward, both):
    (query, keys), (repeats, launches) = layer.sizes, layer.repeated(devices)
    keys *= repeats
    ahead = BYTES * (2 * query + keys)
    back = BYTES * 2 * query + (SUM_BYTES if repeats > 1 else BYTES) * keys
    sums = 3 * SUM_BYTES * layer.heads  # the log-sum-exp, which only a backward pass asks for
    assert {x.kind for x in both.collectives} == {"all-to-all"}
    assert moved(forward) == layer.tokens * ahead
    assert moved(both) == layer.tokens * (ahead + back + sums)
    # q, k, v and out; dout, dq, dk and dv; the log-sum-exp there, and back with the other sum.
    assert len(forward.collectives) == 4 * launches
    assert len(both.collectives) == 8 * launches + 2


def check_ring_moves(layer, devices, forward, both):
    query, keys = layer.sizes
    ring = [(n, (n + 1) % devices) for n in range(devices)]
    mirror = [(n, devices - 1 - n) for n in range(devices)]
    assert {x.kind for x in both.collectives} == {"collective-permute"}
    assert all(set(x.pairs) in (set(ring), set(mirror)) for x in both.collectives)
    # Before the loop of P - 2 hops, and in each of them; at the end gradients as they are added.
    keys_moved, sums_moved = (layer.tokens * keys * size for size in (BYTES, SUM_BYTES))
    assert moved(forward, ring) == moved(forward, ring, in_loop=True) == keys_moved
    assert moved(both, ring) == 3 * keys_moved + sums_moved
    assert moved(both, ring, in_loop=True) == 2 * keys_moved + sums_moved
    ahead = BYTES * (2 * query + keys) + SUM_BYTES * layer.heads
    back = BYTES * (3 * query + 2 * keys) + 2 * SUM_BYTES * layer.heads
    half = layer.tokens // 2
    assert moved(forward, mirror) == half * ahead
    assert moved(both, mirror) == half * (ahead + back)


def memory_by_formula(layer, devices, implementation):
    """Bytes of a device: of the forward pass, and the most of both passes, as docs/cost.md says."""
    query, keys = layer.sizes
    if layer.exchange == "ring":
        forward = 8 * query + 6 * keys + 8 * layer.heads
        both = 20 * query + 25 * keys + 50 * layer.heads
    else:
        repeats, launches = layer.repeated(devices)
        keys *= repeats
        forward = (1 + launches) * query + 2 * keys + 4 * layer.heads / launches
        queries, copies = 4 if launches == 1 else 7, 2 if repeats == 1 else 8
        both = queries * query + copies * keys + 8 * layer.heads
        if implementation == "mosaic_gpu" and launches == 1:
            both += 5 * query
    return layer.tokens * forward, layer.tokens * both


def check_memory(layer, devices, implementation, forward, both):
    ahead, most = memory_by_formula(layer, devices, implementation)
    assert forward.temporary == pytest.approx(ahead, rel=3e-3)
    assert 0.65 * most <= both.temporary <= 1.003 * most


# One test, as each worker would compile the programs anew.
@pytest.mark.parametrize("layer", [HEADS, REPEATED_HEADS, RING], ids=["heads", "repeated", "ring"])
def test_messages_and_memory_follow_the_formulas_and_programs_do_not_grow(layer):
    check_moves = check_ring_moves if layer.exchange == "ring" else check_all_to_all_moves
    found = {devices: programs(layer, devices, "triton") for devices in DEVICES}
    for devices, shares in found.items():
        check_moves(layer, devices, *shares)
        check_memory(layer, devices, "triton", *shares)
    for few, many in zip(*found.values(), strict=True):
        assert many.launches == few.launches
        assert many.instructions <= few.instructions
        assert many.characters <= 1.001 * few.characters


@pytest.mark.parametrize("kv_heads", [4, 8], ids=["one_launch", "two_launches"])
def test_kernels_of_hopper_need_what_the_formula_says(kv_heads):
    layer = Layer("all_to_all", 4096, heads=32, kv_heads=kv_heads, dim=128)
    check_memory(layer, 4, "mosaic_gpu", *programs(layer, 4, "mosaic_gpu"))
