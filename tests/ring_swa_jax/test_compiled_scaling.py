"""A ring of 4, of 16 and of 64 Hopper GPUs with as many tokens on each: a device's share stays.

Read from the compiled programs, of the forward pass and of the backward pass. Deselected by
default, as `test_compile.py`: `pytest -m aot`.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers import compile_target
from tests.helpers.device_share import share_of

pytestmark = pytest.mark.aot

DEVICES = (4, 16, 64)
HEADS, KV_HEADS, DIM = 8, 2, 128
FORWARD = ("ring_swa_forward",)
BACKWARD = ("ring_swa_backward_query", "ring_swa_backward_keys")


@dataclasses.dataclass(frozen=True)
class Layer:
    """Window and tokens of a device."""

    window: int
    chunk: int

    @property
    def hops(self):
        """Distances of the devices that the windows of a chunk reach."""
        return range(1, -(-self.window // self.chunk) + 1)


ONE_HOP, THREE_HOPS = Layer(1000, 2048), Layer(3 * 512, 512)


@functools.cache
def programs(layer, devices):
    """(forward, backward) for so many GPUs.

    Two programs: in one, the compiler lets the passes share a hop that both fetch at once.
    """
    mesh = compile_target.mesh(devices)
    sharding = NamedSharding(mesh, P(None, "seq"))
    attend = functools.partial(
        rsj.ring_attention,
        window_size=layer.window,
        exchange="halo",
        implementation="triton",
    )

    def heads(count):
        dims = (1, devices * layer.chunk, count, DIM)
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=sharding)

    def forward(query, key, value):
        return jax.vjp(attend, query, key, value)

    def backward(pull, dout):
        return pull(dout)

    def compiled(function, *types):
        lowered = jax.jit(function).lower(*types)
        return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})

    query, key = heads(HEADS), heads(KV_HEADS)
    with jax.set_mesh(mesh):
        ahead = compiled(forward, query, key, key)
        # As leaves: no two pullbacks are pytrees of the same structure.
        results, structure = jax.tree.flatten(jax.eval_shape(forward, query, key, key))
        placed = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            for x, where in zip(results, jax.tree.leaves(ahead.output_shardings), strict=True)
        ]
        _, pull = jax.tree.unflatten(structure, placed)
        back = compiled(backward, pull, query)
    return read(ahead, devices), read(back, devices)


def read(compiled, devices):
    """({distance: bytes}, Share)."""
    found, moved = share_of(compiled), collections.Counter()
    for one in found.collectives:
        assert one.kind == "collective-permute", one
        (distance,) = {target - source for source, target in one.pairs}
        assert len(one.pairs) == devices - abs(distance), "all of that distance, none wraps around"
        moved[distance] += one.bytes
    return dict(moved), found


def moved_by_formula(layer):
    """({distance: bytes} forward, backward), docs/cost.md's: several hops twice, in float32."""
    ahead = {}
    for hop in layer.hops:
        tokens = min(layer.chunk, layer.window - (hop - 1) * layer.chunk)
        ahead[hop] = tokens * KV_HEADS * 2 * DIM * 2
    if len(layer.hops) == 1:
        return ahead, {-hop: size for hop, size in ahead.items()}
    return ahead, ahead | {-hop: 2 * size for hop, size in ahead.items()}


@pytest.mark.parametrize("layer", [ONE_HOP, THREE_HOPS], ids=["one_hop", "three_hops"])
def test_a_device_has_the_same_share_of_any_number(layer):
    few, launches = programs(layer, DEVICES[0]), len(layer.hops) + 1
    for devices in DEVICES:
        moved, found = zip(*programs(layer, devices), strict=True)
        assert moved == moved_by_formula(layer)
        assert [dict(one.launches) for one in found] == [
            dict.fromkeys(FORWARD, launches), dict.fromkeys(BACKWARD, launches)
        ]  # fmt: skip
        for got, (_, expected) in zip(found, few, strict=True):
            assert got.instructions == expected.instructions
            assert got.temporary == expected.temporary
            assert got.characters == pytest.approx(expected.characters, rel=1e-3)


def test_the_programs_grow_with_the_hops():
    pairs = zip(programs(ONE_HOP, DEVICES[0]), programs(THREE_HOPS, DEVICES[0]), strict=True)
    for (_, one), (_, three) in pairs:
        assert three.launches.total() == 2 * one.launches.total()
        assert one.instructions < three.instructions < 3 * one.instructions
