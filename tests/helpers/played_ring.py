"""A ring with exchange="halo" on one device, which plays all the ring's devices in turn.

So one GPU, or the simulator, runs what else needs several: keys before a chunk and after it in one
hop or many, fetched sinks, and gradients that come home.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import pallas_kernels
from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._halo import RingHalo
from ring_swa_jax._window import Window
from tests.helpers import oracle
from tests.helpers.cases import Case
from tests.helpers.oracle import Result


# No two are equal: what is sent home is kept in a list.
@dataclasses.dataclass(frozen=True, eq=False)
class PlayedHalo:
    """A `pallas_kernels.Halo` of one chunk, cut from the whole rows.

    Attributes:
        lengths: keys of each hop.
        chunk: the chunk's tokens.
        is_after: whether the keys are after the chunk.
        keys: all keys and values, with zeros for padding.
        home: (positions, dkey, dvalue) of what was sent home.
    """

    lengths: tuple[int, ...]
    chunk: slice
    is_after: bool
    keys: tuple[Array, Array]
    home: list

    def fetch(self, hop, key, value, start, *, after=None):
        first, length = self._first(hop), self.lengths[hop]
        if not self._is_there(first):
            return tuple(jnp.zeros_like(x[:, :length]) for x in (key, value))
        return tuple(x[:, first : first + length] for x in self.keys)

    def give_back(self, hop, dkey, dvalue):
        if self._is_there(first := self._first(hop)):
            self.home.append((np.arange(first, first + dkey.shape[1])[None], dkey, dvalue))
        return jnp.zeros_like(dkey), jnp.zeros_like(dvalue)

    def _first(self, hop):
        """Position of a hop's first key."""
        if self.is_after:
            return self.chunk.stop + hop * (self.chunk.stop - self.chunk.start)
        return self.chunk.start - sum(self.lengths[: hop + 1])

    def _is_there(self, first):
        return 0 <= first < self.keys[0].shape[1]


def program(case: Case, implementation: str):
    """f(q, k, v, sink_logits, documents, dout) -> Result of whole rows.

    What the documents are is read from the case.
    """
    axis = SequenceAxis("seq", case.devices)
    left, right = Window.of(case.window).reach(case.length)
    scale = case.dims[0] ** -0.5 if case.scale is None else case.scale
    spec = pallas_kernels.Spec(
        window=None if left is None else left + right,
        num_sinks=0 if left is None else case.sinks,
        scale=scale,
        soft_cap=case.softcap,
        precision="highest",
        lookahead=right,
    )
    starts, ends = bounds(case)
    real = None if case.documents is None else (starts < ends)[..., None, None]

    def halo(here, keys, home, *, is_after):
        reach = spec.lookahead if is_after else spec.keys_before
        lengths = RingHalo.of_window(axis, case.chunk, reach, is_after=is_after).lengths
        return PlayedHalo(lengths, here, is_after, keys, home)

    def attend_and_pull(rank, q, k, v, sink_logits, dout):
        """The chunk's output, the gradient of its queries, what it sends home, dsink_logits."""
        here = slice(rank * case.chunk, (rank + 1) * case.chunk)
        keys = (k, v) if real is None else tuple(jnp.where(real, x, 0) for x in (k, v))
        home = []
        before, after = (halo(here, keys, home, is_after=x) for x in (False, True))
        slots, sinks = None, None
        if spec.num_sinks and case.devices > 1:
            slots = starts[:, here.start, None] + np.arange(spec.num_sinks)
            sinks = fetched_sinks(slots, here.start, *keys)
        start, end = (jnp.asarray(x[:, here] - here.start, jnp.int32) for x in (starts, ends))
        if real is None:
            start, end = start[0, 0], end[0, 0] if case.devices > 1 else None

        def attend(q, k, v, sinks, sink_logits):
            arrays = (q, k, v, sinks, sink_logits, start)
            if not spec.lookahead:
                return pallas_kernels.attend(spec, before, implementation, *arrays)
            sides = pallas_kernels.Sides(before, after)
            return pallas_kernels.attend_both_sides(spec, sides, implementation, *arrays, end)

        own = (x[:, here] for x in (q, k, v))
        out, pull = jax.vjp(attend, *own, sinks, sink_logits)
        dq, dk, dv, dsinks, dsink_logits = pull(dout[:, here])
        span = np.arange(here.start, here.stop)[None]
        home.append((span, dk, dv))
        if sinks is not None:
            home.append((np.where(slots < here.start, slots, case.length), *dsinks))
        return out, dq, home, dsink_logits

    def run(q, k, v, sink_logits, _, dout):
        parts = [attend_and_pull(rank, q, k, v, sink_logits, dout) for rank in range(case.devices)]
        outs, dqs, homes, dsinks = zip(*parts, strict=True)
        dk, dv = (jnp.zeros(x.shape, pallas_kernels.accumulator_dtype(x.dtype)) for x in (k, v))
        rows = np.arange(case.batch)[:, None]
        for positions, dkey, dvalue in itertools.chain(*homes):  # those past the end are nobody's
            dk, dv = (
                x.at[rows, positions].add(dx.astype(x.dtype), mode="drop")
                for x, dx in ((dk, dkey), (dv, dvalue))
            )
        whole = (jnp.concatenate(x, axis=1) for x in (outs, dqs))
        dsink = None if sink_logits is None else sum(dsinks)
        return Result(*whole, dk.astype(k.dtype), dv.astype(v.dtype), dsink)

    return run


def bounds(case: Case):
    """[B, S] (start, end) of each token's sequence; of padding token i, (i + 1, i + 1)."""
    if case.packed:
        rows = [oracle.starts_from_cu_seqlens(case.cu_seqlens(), case.length)]
    elif case.documents is not None:
        rows = [oracle.starts_from_segment_ids(ids) for ids in case.segment_ids()]
    else:
        rows = [np.zeros(case.length, np.int64)] * case.batch
    start, next_position = np.stack(rows), np.arange(case.length) + 1
    tokens = (start[:, :, None] == start[:, None]).sum(-1)
    padding = start == oracle.PADDING
    return np.where(padding, next_position, start), np.where(padding, next_position, start + tokens)


def fetched_sinks(slots, chunk_begin, key, value):
    """The `SinkRun` of a chunk; zeros for what is in the chunk or behind it."""
    is_there = jnp.asarray(slots < chunk_begin)[..., None, None]
    index = jnp.asarray(np.minimum(slots, key.shape[1] - 1))[..., None, None]
    rows = (jnp.take_along_axis(x, index, axis=1) for x in (key, value))
    dtype = pallas_kernels.accumulator_dtype(key.dtype)
    return pallas_kernels.SinkRun(*(jnp.where(is_there, x, 0).astype(dtype) for x in rows))
