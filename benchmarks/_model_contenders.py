"""What takes the place of `ring_swa_jax.ring_attention` in the layers of the compared models.

A contender has the arguments of `ring_attention`; the model around it is the same for all.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

import ring_swa_jax
from benchmarks._exchanges import AXIS, gather_window, heads_for_sequence
from benchmarks._model_cudnn import Gradients, Launch, differentiable, merged
from ring_swa_jax import _layer

OURS, ALL_GATHER, ALL_TO_ALL = "ours", "all-gather + cuDNN", "all-to-all + cuDNN"


def _one_launch(launch: Launch):
    return differentiable(launch.forward, launch.backward)


def all_gather(query, key, value, sinks, *, window: int | None, scale: float):
    """All keys and values gathered; cuDNN on those that this device's queries may see."""
    devices, chunk = lax.axis_size(AXIS), query.shape[1]
    if devices == 1:
        return _one_launch(Launch(scale, window=window))(query, key, value, sinks)
    if window is not None:
        launch = _one_launch(Launch(scale, window=window))

        def attend(query, key, value, _):
            return launch(query, key, value, sinks)

        return gather_window(attend, window, devices)(query, key, value, None)
    key, value = (lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (key, value))
    return _by_rank(scale, devices, chunk)(query, key, value, sinks)


def _by_rank(scale: float, devices: int, chunk: int):
    """Without a window: every device's own program, its keys sliced statically.

    Two launches, as cuDNN's causal mask aligns the first query with the first key: all keys
    before the chunk without a mask, and the chunk's own.
    """
    before_launch, own_launch = Launch(scale, causal=False), Launch(scale)

    def forward_of(rank, query, key, value):
        begin = rank * chunk
        own = own_launch.forward(query, *(x[:, begin : begin + chunk] for x in (key, value)))
        if rank == 0:
            return own
        return merged(before_launch.forward(query, key[:, :begin], value[:, :begin]), own)

    def backward_of(rank, query, key, value, attended, dout):
        begin = rank * chunk
        end = begin + chunk
        own = own_launch.backward(query, key[:, begin:end], value[:, begin:end], attended, dout)
        parts = [own]
        if rank > 0:
            earlier = key[:, :begin], value[:, :begin]
            parts.insert(0, before_launch.backward(query, *earlier, attended, dout))
        later = ((0, 0), (0, key.shape[1] - end), (0, 0), (0, 0))
        dkey, dvalue = (
            jnp.pad(jnp.concatenate(x, axis=1), later)
            for x in zip(*(part[1:] for part in parts), strict=True)
        )
        dquery = functools.reduce(jnp.add, (part.query for part in parts))
        return Gradients(dquery, dkey, dvalue)

    def by_rank(of_rank):
        branches = [functools.partial(of_rank, rank) for rank in range(devices)]
        return lambda *inputs: lax.switch(lax.axis_index(AXIS), branches, *inputs)

    return differentiable(by_rank(forward_of), by_rank(backward_of))


def all_to_all(query, key, value, sinks, *, window: int | None, scale: float):
    """Heads cut instead of the sequence, and back, cuDNN between; keys repeated where needed."""
    devices, heads = lax.axis_size(AXIS), query.shape[2]
    if heads % devices:
        raise NotImplementedError(f"{heads} heads over {devices} devices")
    launch = _one_launch(Launch(scale, window=window))
    if devices == 1:
        return launch(query, key, value, sinks)
    times = math.lcm(key.shape[2], devices) // key.shape[2]
    key, value = (jnp.repeat(x, times, axis=2) for x in (key, value))
    own = heads // devices

    def attend(query, key, value, _):
        mine = sinks
        if sinks is not None:
            mine = lax.dynamic_slice_in_dim(sinks, lax.axis_index(AXIS) * own, own)
        return launch(query, key, value, mine)

    return heads_for_sequence(attend)(query, key, value, None)


def _over_mesh(attend: Callable[..., Array]) -> Callable[..., Array]:
    """A function of a device's part of the arrays in the place of `ring_attention`."""

    def attention(q, k, v, *, window_size, sink_logits, scale, segment_ids, batch_axis, **others):
        if segment_ids is not None or others["num_sink_tokens"] or others["logits_soft_cap"]:
            raise NotImplementedError("packed sequences, sink tokens and soft caps")
        if window_size is not None and window_size >= q.shape[1] - 1:
            window_size = None  # reaches the whole sequence
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        cut = P(batch_axis, AXIS)
        local = functools.partial(attend, window=window_size, scale=scale)
        return jax.shard_map(
            local, in_specs=(cut, cut, cut, P()), out_specs=cut, check_vma=False
        )(q, k, v, sink_logits)  # fmt: skip

    return attention


CONTENDERS: dict[str, Callable[..., Array]] = {
    OURS: ring_swa_jax.ring_attention,
    ALL_GATHER: _over_mesh(all_gather),
    ALL_TO_ALL: _over_mesh(all_to_all),
}


@contextlib.contextmanager
def attending_by(name: str) -> Iterator[None]:
    """While a model is traced, its layers attend by this contender."""
    with mock.patch.object(_layer, "ring_attention", CONTENDERS[name]):
        yield
