"""What is compared on layers without a window and on long windows, over several GPUs of one host.

A builder takes a shape, a number of devices and an implementation of ours; see
`benchmarks._exchanges`. "FA3 ring" and "one GPU" are functions of whole arrays.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

import pallas_kernels
from benchmarks._exchanges import AXIS, Build, all_to_all_ours, all_to_all_peer, learned_sinks, ring
from benchmarks._one_rank import spec_of
from benchmarks._peers import CONTENDERS, Attend
from benchmarks._ring_shapes import RingShape
from ring_swa_jax import _all_to_all
from ring_swa_jax._attend_chunk import attend_chunk
from ring_swa_jax._axis import SequenceAxis, same_varying
from ring_swa_jax._head_exchange import HeadExchange
from ring_swa_jax._segments import whole_bounds

OURS, ONE_GPU = "ours", "one GPU"


@dataclasses.dataclass(frozen=True)
class Full:
    """A contender.

    Attributes:
        build: makes its function for a shape.
        whole: whether the function takes whole arrays, not a device's parts inside a shard_map.
        options: XLA options to compile the gradients with.
        windows: whether it is for windows too.
    """

    build: Build
    whole: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    windows: bool = False


def _launches(most: int) -> Build:
    """exchange="all_to_all" with at most so many launches."""

    def build(shape: RingShape, devices: int, implementation: str | None) -> Attend:
        spec, axis = spec_of(shape), SequenceAxis(AXIS, devices)
        exchange = HeadExchange.of_heads(axis, "contiguous", shape.kv_heads, most)
        if exchange.launches != most:
            raise NotImplementedError(f"{shape.kv_heads} key/value heads over {devices} devices")

        def attend(query, key, value, ends):
            start, _ = whole_bounds(axis, query.shape[1], ends, None)
            arrays = same_varying(axis, query, key, value, learned_sinks(shape), start)
            name = pallas_kernels.choose(implementation, spec, query, value)
            return _all_to_all.attend_heads(spec, exchange, name, *arrays, None)

        return attend

    return build


def _dual_chunk(exchange: str) -> Build:
    """Ours on arrays in dual-chunk order. Random tokens are in any order: results differ."""

    def build(shape: RingShape, devices: int, implementation: str | None) -> Attend:
        if shape.documents or shape.learned:
            raise NotImplementedError("timed on the plain rows alone")

        def attend(query, key, value, ends):
            return attend_chunk(
                query, key, value, axis=SequenceAxis(AXIS, devices), window_size=shape.window,
                num_sink_tokens=0, scale=None, logits_soft_cap=None, sink_logits=None,
                layout="dual_chunk", exchange=exchange, implementation=implementation,
            )  # fmt: skip

        return attend

    return build


def _fa3_ring(shape: RingShape, devices: int, implementation: str | None) -> Attend:
    """What flash_attn3_jax does by itself with a sequence that is cut."""
    del devices, implementation
    if shape.documents or shape.learned:
        raise NotImplementedError("takes no packed documents over devices, and no learned sinks")
    return CONTENDERS["fa3"].build(shape)


def _one_gpu(shape: RingShape, devices: int, implementation: str | None) -> Attend:
    del devices
    return ring(shape, 1, implementation, axis_name=None)


def _any_order(build: Callable[..., Attend], **settings: Any) -> Build:
    def nondeterministic(shape: RingShape, devices: int, implementation: str | None) -> Attend:
        del implementation
        return build(shape, devices, "mosaic_gpu_nondeterministic", **settings)

    return nondeterministic


_DETERMINISTIC = CONTENDERS["cudnn-deterministic"].options
FULL: dict[str, Full] = {
    OURS: Full(ring, windows=True),
    "ours again": Full(ring, windows=True),
    "halo": Full(partial(ring, exchange="halo"), windows=True),
    "all_to_all": Full(partial(ring, exchange="all_to_all"), windows=True),
    "all_to_all, 1 launch": Full(_launches(1)),
    "all_to_all, 4 launches": Full(_launches(4)),
    "all_to_all, dual_chunk": Full(_dual_chunk("all_to_all")),
    "ring": Full(partial(ring, exchange="ring"), windows=True),
    "ring, dual_chunk": Full(_dual_chunk("ring")),
    "all_to_all, any order": Full(_any_order(ring, exchange="all_to_all")),
    "ring, any order": Full(_any_order(ring, exchange="ring")),
    "plain + our kernel": Full(all_to_all_ours, windows=True),
    "plain + ours, any order": Full(_any_order(all_to_all_ours)),
    "plain + cuDNN": Full(all_to_all_peer("cudnn"), windows=True),
    "plain + cuDNN, det.": Full(all_to_all_peer("cudnn"), options=_DETERMINISTIC),
    "plain + FA3": Full(all_to_all_peer("fa3"), windows=True),
    "plain + FA3, det.": Full(all_to_all_peer("fa3-deterministic")),
    "FA3 ring": Full(_fa3_ring, whole=True),
    ONE_GPU: Full(_one_gpu, whole=True, windows=True),
}
"""By name; "plain" is an all-to-all around a kernel, with the gradients that JAX makes of it."""


def names_for(shape: RingShape) -> list[str]:
    """The contenders of a shape."""
    if shape.window is None:
        return [name for name in FULL if name != "halo"]
    return [name for name, x in FULL.items() if x.windows]


def specs_of_whole(types: tuple[Any, ...], sharding: jax.sharding.Sharding) -> tuple[Any, ...]:
    """The same types with another sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), types)
