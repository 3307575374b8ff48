"""The ways to attend over a sequence that is cut over a mesh: ours, and what else JAX offers.

A builder takes a shape, a number of devices and an implementation of ours, and returns
``attend(query, key, value, cu_seqlens)`` on a device's own part of [B, S, heads, H], to be called
inside a shard_map over the axis "seq". It raises NotImplementedError for what it cannot do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

import pallas_kernels
import ring_swa_jax
from benchmarks._one_rank import spec_of
from benchmarks._peers import CONTENDERS, Attend
from benchmarks._ring_shapes import RingShape
from ring_swa_jax._axis import SequenceAxis, same_varying
from ring_swa_jax._halo import RingHalo, fetch_sinks
from ring_swa_jax._segments import from_cu_seqlens, one_sequence

AXIS = "seq"
Build = Callable[[RingShape, int, str | None], Attend]


def learned_sinks(shape: RingShape) -> Array | None:
    """One number for each query head, where the shape has learned sinks."""
    return jnp.linspace(-1, 1, shape.heads) if shape.learned else None


def ring(
    shape: RingShape,
    devices: int,
    implementation: str | None,
    *,
    exchange: str | None = None,
    axis_name: str | None = AXIS,
    sinks_of: Callable[[RingShape], Array | None] = learned_sinks,
) -> Attend:
    """The public functions."""
    options: dict[str, Any] = {
        "window_size": shape.window_size,
        "num_sink_tokens": shape.sinks,
        "axis_name": axis_name,
        "exchange": exchange,
        "implementation": implementation,
    }

    def attend(query, key, value, ends):
        sinks = sinks_of(shape)
        if ends is None:
            return ring_swa_jax.ring_streaming_llm_attn(
                query, key, value, sink_logits=sinks, **options
            )
        return ring_swa_jax.ring_streaming_llm_attn_varlen(
            query[0], key[0], value[0], cu_seqlens=ends, sink_logits=sinks, **options
        )[None]

    return attend


@dataclasses.dataclass(frozen=True)
class GatheredHalo:
    """A `pallas_kernels.Halo` out of an all-gather of all keys and values."""

    devices: int
    chunk: int
    lengths: tuple[int, ...]

    def fetch(
        self, hop: int, key: Array, value: Array, start: Array, *, after: Array | None = None
    ):
        """The hop's part of the gathered arrays; on the first devices keys that nobody sees."""
        del start, after  # no benchmark has NaN in padding
        begin = jnp.maximum(self._begin(hop), 0)

        def fetched(x):
            whole = lax.all_gather(x, AXIS, axis=1, tiled=True)
            return lax.dynamic_slice_in_dim(whole, begin, self.lengths[hop], axis=1)

        return fetched(key), fetched(value)

    def give_back(self, hop: int, dkey: Array, dvalue: Array):
        """The transpose: a reduce-scatter of gradients as long as the whole sequence."""
        begin = self._begin(hop)

        def returned(x):
            zeros = jnp.zeros((x.shape[0], self.devices * self.chunk, *x.shape[2:]), x.dtype)
            x = jnp.where(begin < 0, 0, x)
            whole = lax.dynamic_update_slice_in_dim(zeros, x, jnp.maximum(begin, 0), axis=1)
            own = lax.psum_scatter(whole, AXIS, scatter_dimension=1, tiled=True)
            return own[:, self.chunk - self.lengths[hop] :]

        return returned(dkey), returned(dvalue)

    def _begin(self, hop: int) -> Array:
        return lax.axis_index(AXIS) * self.chunk - sum(self.lengths[: hop + 1])


def _only_causal(shape: RingShape) -> None:
    if shape.after != 0:
        raise NotImplementedError("is written here for causal windows alone")


def all_gather_ours(shape: RingShape, devices: int, implementation: str | None) -> Attend:
    """All keys and values gathered; then the ring's own schedule and kernels."""
    _only_causal(shape)
    chunk, spec = shape.chunk(devices), spec_of(shape)
    axis = SequenceAxis(AXIS, devices)
    lengths = RingHalo.of_window(axis, chunk, shape.window).lengths
    halo = GatheredHalo(devices, chunk, lengths)

    def attend(query, key, value, ends):
        bounds = one_sequence(axis, chunk) if ends is None else from_cu_seqlens(axis, chunk, ends)
        query, key, value, bounds = same_varying(axis, query, key, value, bounds)
        sinks = fetch_sinks(axis, key, value, bounds, spec.num_sinks) if spec.num_sinks else None
        name = pallas_kernels.choose(implementation, spec, query, value)
        arrays = (query, key, value, sinks, None, bounds.start)
        return pallas_kernels.attend(spec, halo, name, *arrays)

    return attend


def all_gather_cudnn(shape: RingShape, devices: int, implementation: str | None) -> Attend:
    """All keys and values gathered, then cuDNN on those that the device's windows reach.

    cuDNN aligns the first query with the first key, so the queries stand behind as many rows of
    zeros as there are keys before them: a window's worth of rows that nobody needs, but far less
    than all keys.
    """
    del implementation
    _only_causal(shape)
    if shape.documents:
        raise NotImplementedError("packed sequences that end before the device's keys begin")
    return gather_window(CONTENDERS["cudnn"].build(shape), shape.window, devices)


def gather_window(attend: Attend, window: int | None, devices: int) -> Attend:
    """All keys and values gathered; a causal kernel on those that the device's windows reach."""

    def around(query, key, value, ends):
        chunk = query.shape[1]
        before = (devices - 1) * chunk
        # cuDNN refuses odd lengths
        halo = before if window is None else min(-(-window // 64) * 64, before)
        position = lax.axis_index(AXIS) * chunk
        begin = jnp.maximum(position - halo, 0)

        def reached(x):
            whole = lax.all_gather(x, AXIS, axis=1, tiled=True)
            return lax.dynamic_slice_in_dim(whole, begin, halo + chunk, axis=1)

        rows = jnp.zeros((query.shape[0], halo + chunk, *query.shape[2:]), query.dtype)
        rows = lax.dynamic_update_slice_in_dim(rows, query, position - begin, axis=1)
        out = attend(rows, reached(key), reached(value), ends)
        return lax.dynamic_slice_in_dim(out, position - begin, chunk, axis=1)

    return around


def all_to_all(shape: RingShape, devices: int, attend: Attend) -> Attend:
    """Heads cut instead of the sequence, and back (Ulysses, arXiv:2309.14509), a kernel between.

    As anybody would write it: gradients are JAX's.
    """
    if shape.kv_heads % devices:
        raise NotImplementedError(f"{shape.kv_heads} key/value heads over {devices} devices")

    return heads_for_sequence(attend)


def heads_for_sequence(attend: Attend) -> Attend:
    """A kernel on the whole sequence of a device's heads; the devices divide all head counts."""

    def exchange(x, cut, joined):
        return lax.all_to_all(x, AXIS, split_axis=cut, concat_axis=joined, tiled=True)

    def between(query, key, value, ends):
        query, key, value = (exchange(x, 2, 1) for x in (query, key, value))
        return exchange(attend(query, key, value, ends), 1, 2)

    return between


def all_to_all_ours(shape: RingShape, devices: int, implementation: str | None) -> Attend:
    """Our kernels on a device's heads, without an exchange of ours."""
    heads = shape.heads // devices

    def own_sinks(_: RingShape) -> Array | None:
        sinks = learned_sinks(shape)
        if sinks is None:
            return None
        return lax.dynamic_slice_in_dim(sinks, lax.axis_index(AXIS) * heads, heads)

    attend = ring(shape, 1, implementation, axis_name=None, sinks_of=own_sinks)
    return all_to_all(shape, devices, attend)


def all_to_all_peer(name: str) -> Build:
    """A peer's kernel on a device's heads."""

    def build(shape: RingShape, devices: int, implementation: str | None) -> Attend:
        del implementation
        if shape.learned:
            raise NotImplementedError("takes no learned sinks")
        return all_to_all(shape, devices, CONTENDERS[name].build(shape))

    return build


OVER_MESH: dict[str, Build] = {
    "ring": ring,
    "all-gather + ours": all_gather_ours,
    "all-gather + cuDNN": all_gather_cudnn,
    "all-to-all + cuDNN": all_to_all_peer("cudnn"),
}
