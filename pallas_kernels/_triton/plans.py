"""Which tiles the Pallas-Triton kernels take: the best ones that fit into shared memory.

For each kernel there are candidates, from best to smallest. The first ones won in
``benchmarks.tiles`` on an H100. The others are for GPUs with less shared memory, none of which was
at hand: they are compiled for these GPUs, and were timed on an H100 only
(``benchmarks.small_plans``).
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels._device import Gpu
from pallas_kernels._triton.shared_memory import shared_memory
from pallas_kernels._triton.tiles import TritonPlan, TritonTiles, sink_tile

Launches = dict[str, TritonTiles]
"""The tiles of launches that stand or fall together, named as in `shared_memory`."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a plan depends on.

    Attributes:
        dtype: of queries, keys and values.
        head_dim: of queries and keys.
        value_dim: of values.
        window: keys before a query that it sees, or None.
        group: query heads of a key head.
        rows: queries of the shard.
        num_sinks: sink tokens of a sequence.
    """

    dtype: jnp.dtype
    head_dim: int
    value_dim: int
    window: int | None
    group: int
    rows: int
    num_sinks: int = 0


class Candidates(NamedTuple):
    """Tiles for each kernel, from best to smallest; ``dkv`` is by one launch or by two."""

    forward: tuple[TritonTiles, ...]
    dquery: tuple[TritonTiles, ...]
    dkv: tuple[Launches, ...]


def triton_plan(implementation: str, shapes: Shapes, gpu: Gpu | None) -> TritonPlan:
    """The plan for these inputs: the first candidate of each kernel that fits.

    Args:
        implementation: the one that was asked for, for the message.
        shapes: of the inputs.
        gpu: the one that is compiled for; None for the interpreter, where everything fits.

    Raises:
        NotImplementedError: nothing fits; says how many bytes are asked for and how many there are.
    """
    candidates = triton_candidates(shapes)
    launches = (
        _first_fit(implementation, shapes, gpu, [{"forward": x} for x in candidates.forward])
        | _first_fit(implementation, shapes, gpu, [{"dquery": x} for x in candidates.dquery])
        | _first_fit(implementation, shapes, gpu, list(candidates.dkv))
    )
    dkey = launches.get("dkey") or launches["dkey_dvalue"]
    if shapes.num_sinks:
        launches |= _first_fit(
            implementation, shapes, gpu, [{"sinks": x} for x in _sink_tiles(dkey, shapes)]
        )
    return TritonPlan(
        launches["forward"],
        launches["dquery"],
        dkey,
        dvalue=launches.get("dvalue"),
        sinks=launches.get("sinks"),
    )


def launch_bytes(kernel: str, tiles: TritonTiles, shapes: Shapes, capability: float) -> int:
    """Shared memory of a launch, in bytes, for a GPU of this compute capability."""
    return shared_memory(
        "dkey_dvalue" if kernel == "sinks" else kernel,
        tiles,
        shapes.head_dim,
        shapes.value_dim,
        itemsize=jnp.dtype(shapes.dtype).itemsize,
        capability=capability,
    )


def _first_fit(
    implementation: str, shapes: Shapes, gpu: Gpu | None, candidates: list[Launches]
) -> Launches:
    """The first candidate whose launches all fit, cut to what the shapes ask for."""
    asked = []
    for candidate in candidates:
        launches = {
            name: tiles.of_group(shapes.group).fit(shapes.rows, shapes.rows)
            for name, tiles in candidate.items()
        }
        if gpu is None:
            return launches
        most = max(launch_bytes(name, x, shapes, gpu.capability) for name, x in launches.items())
        if most <= gpu.shared_memory:
            return launches
        asked.append(most)
    assert gpu is not None
    sinks = f", num_sink_tokens={shapes.num_sinks}" if shapes.num_sinks else ""
    raise NotImplementedError(
        f"implementation={implementation!r} needs {min(asked)} bytes of shared memory for the "
        f"kernel of {' and '.join(candidates[0])}, this GPU has {gpu.shared_memory}: head dims "
        f"{shapes.head_dim} of q and k, {shapes.value_dim} of v, dtype "
        f"{jnp.dtype(shapes.dtype).name}{sinks}"
    )


def triton_candidates(shapes: Shapes) -> Candidates:
    """Tiles worth a try for these inputs."""
    if jnp.dtype(shapes.dtype).itemsize > 2:
        return _float32(shapes)
    dim = max(shapes.head_dim, shapes.value_dim)
    if dim <= 64:
        return _heads_of_64(shapes)
    return _heads_of_128(shapes) if dim <= 128 else _heads_of_256(shapes)


def _has_unmasked_loop(window: int | None) -> bool:
    """Whether unmasked tiles get a loop of their own."""
    return window is None or window >= 256


def _float32(shapes: Shapes) -> Candidates:
    """IEEE products have no tensor cores: their operands and all their steps are in registers.

    Beyond 128 each further loop or row adds seconds to the compilation and spills kilobytes.
    """
    dim = max(shapes.head_dim, shapes.value_dim)
    if dim > 128:
        tiles = TritonTiles(32, 16, 4, 2, unmasked_loop=False)
        return Candidates((tiles,), (tiles,), ({"dkey": tiles, "dvalue": tiles},))
    tiles = TritonTiles(32 if dim > 64 else 64, 32, 4, 2, _has_unmasked_loop(shapes.window))
    return Candidates((tiles,), (tiles,), ({"dkey_dvalue": tiles},))


def _heads_of_64(shapes: Shapes) -> Candidates:
    """Several heads of a group in a tile waste less at the edges of a short window."""
    if _has_unmasked_loop(shapes.window):
        return Candidates(
            (TritonTiles(128, 64, 4, 3),),
            (TritonTiles(64, 32, 4, 3),),
            ({"dkey_dvalue": TritonTiles(64, 64, 4, 3)},),
        )
    return Candidates(
        (TritonTiles(16, 32, 4, 3, False, heads=8),),
        (TritonTiles(8, 32, 4, 3, False, heads=8),),
        ({"dkey_dvalue": TritonTiles(16, 64, 4, 3, False, heads=4)},),
    )


def _heads_of_128(shapes: Shapes) -> Candidates:
    """Between short windows and long ones, more rows of one head are as fast or faster."""
    window, unmasked_loop = shapes.window, _has_unmasked_loop(shapes.window)
    short = window is not None and window < 2048
    one_head = TritonTiles(64, 64, 4, 2, unmasked_loop)
    rows = TritonTiles(128, 64, 8, 3, unmasked_loop)
    smallest = TritonTiles(64, 32, 4, 2, unmasked_loop)
    if short and shapes.group % 8 == 0:
        forward: tuple[TritonTiles, ...] = (
            TritonTiles(16, 64, 8, 3, unmasked_loop, heads=8),
            TritonTiles(8, 64, 4, 2, unmasked_loop, 8),
        )
        dquery: tuple[TritonTiles, ...] = (
            TritonTiles(16, 32, 4, 3, unmasked_loop, heads=8),
            TritonTiles(8, 32, 4, 2, unmasked_loop, 8),
        )
    else:
        forward = (rows, one_head)
        dquery = (one_head, smallest)
    if window is None:
        forward = (TritonTiles(128, 128, 8, 3), *forward)
        dquery = (TritonTiles(128, 64, 8, 3), *dquery)
    dkv = (
        one_head if short else TritonTiles(16, 64, 4, 2, heads=4),
        TritonTiles(32, 64, 4, 2, unmasked_loop),
    )
    return Candidates(forward, dquery, tuple({"dkey_dvalue": x} for x in dkv))


def _heads_of_256(shapes: Shapes) -> Candidates:
    unmasked_loop = _has_unmasked_loop(shapes.window)
    return Candidates(
        (
            TritonTiles(128, 64, 8, 2, unmasked_loop),
            TritonTiles(64, 64, 4, 2, unmasked_loop),
            TritonTiles(64, 32, 4, 2, unmasked_loop),
        ),
        (
            TritonTiles(128, 32, 8, 3, unmasked_loop),
            TritonTiles(128, 32, 8, 2, unmasked_loop),
            TritonTiles(64, 64, 4, 2, unmasked_loop),
            TritonTiles(64, 32, 4, 2, unmasked_loop),
            TritonTiles(32, 32, 4, 2, unmasked_loop),
        ),
        (
            {
                "dkey": TritonTiles(64, 64, 4, 2, unmasked_loop),
                "dvalue": TritonTiles(64, 128, 8, 2, unmasked_loop),
            },
            {
                "dkey": TritonTiles(32, 32, 4, 2, unmasked_loop),
                "dvalue": TritonTiles(32, 64, 4, 2, unmasked_loop),
            },
        ),
    )


def _sink_tiles(dkey: TritonTiles, shapes: Shapes) -> list[TritonTiles]:
    """Tiles of sinks for queries by the tiles of dkey; the last has half as many queries, or 16."""
    most = min(sink_tile(shapes.num_sinks), dkey.key)
    found = [dataclasses.replace(dkey, key=size) for size in (64, 32, 16) if size <= most]
    fewer = max(dkey.query // 2, pl.cdiv(16, dkey.heads))
    return [*found, dataclasses.replace(found[-1], query=fewer)]
