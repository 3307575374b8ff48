"""The last chunk of a ring on one device: all chunks hold the same keys, so nobody need send any.

This runs what a single device cannot run otherwise: keys of a halo, launches that go on from the
one before, fetched sinks and gradients that come home.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

import pallas_kernels
from tests.helpers import oracle
from tests.helpers.cases import Case
from tests.helpers.oracle import Result


@dataclasses.dataclass(frozen=True)
class RepeatedHalo:
    """A `pallas_kernels.Halo`: what the chunks before would send is the last of our own keys."""

    lengths: tuple[int, ...]

    def fetch(self, hop, key, value, start, *, after=None):
        begin = key.shape[1] - self.lengths[hop]
        return key[:, begin:], value[:, begin:]

    def give_back(self, hop, dkey, dvalue):
        return dkey, dvalue


def last_chunk(case: Case, implementation):
    """f(q, k, v, sink_logits, None) of the ring's last device, on its chunk."""
    before = case.length - case.chunk
    window = case.window if case.window is None or case.window < case.length - 1 else None
    halo_keys = before if window is None else min(window, before)
    halo = RepeatedHalo(
        tuple(min(case.chunk, halo_keys - n) for n in range(0, halo_keys, case.chunk))
    )
    start = np.int32(-before) if case.documents is None else starts(case)
    first = start[:, :1] if case.documents else np.full((case.batch, 1), start)
    slots = ((first + np.arange(case.sinks)) % case.chunk)[..., None, None]

    def attend(q, k, v, sink_logits, _):
        spec = pallas_kernels.Spec(
            window=window,
            num_sinks=0 if window is None else case.sinks,
            scale=q.shape[-1] ** -0.5 if case.scale is None else case.scale,
            soft_cap=case.softcap,
            precision="highest",
        )
        sinks = None
        if spec.num_sinks:
            rows = (jnp.take_along_axis(x, jnp.asarray(slots), axis=1) for x in (k, v))
            sinks = pallas_kernels.SinkRun(*(x.astype(jnp.float32) for x in rows))
        name = pallas_kernels.choose(implementation, spec, q, v)
        bounds = jnp.asarray(start, jnp.int32)
        return pallas_kernels.attend(spec, halo, name, q, k, v, sinks, sink_logits, bounds)

    return attend


def starts(case):
    """[B, T]: where the sequence of each of the last chunk's tokens starts, relative to it."""
    if case.packed:
        rows = [oracle.starts_from_cu_seqlens(case.cu_seqlens(), case.length)]
    else:
        rows = [oracle.starts_from_segment_ids(ids) for ids in case.segment_ids()]
    start, position = np.stack(rows), np.arange(case.length)
    start = np.where(start == oracle.PADDING, position + 1, start)
    return start[:, -case.chunk :] - (case.length - case.chunk)


def arrays(case):
    """(q, k, v, sink_logits) and the cotangent of the last chunk."""
    (*qkv, sink), dout = case.arrays()
    q, k, v, dout = (x[:, -case.chunk :] for x in (*qkv, dout))
    return (q, k, v, sink), dout


def expected(case):
    """The oracle's Result: gradients of all the copies of a key add up."""
    (*qkv, sink), dout = arrays(case)
    q, k, v, dout = (np.asarray(x.astype(jnp.float32), np.float64) for x in (*qkv, dout))
    q, k, v = (np.tile(x, (1, case.devices, 1, 1)) for x in (q, k, v))
    dout = np.pad(dout, ((0, 0), (case.length - case.chunk, 0), (0, 0), (0, 0)))
    whole = oracle.attention(
        q, k, v, dout, case.mask(),
        scale=case.scale, logits_soft_cap=case.softcap,
        sink_logits=None if sink is None else np.asarray(sink, np.float64),
    )  # fmt: skip
    dk, dv = (
        x.reshape(case.batch, case.devices, case.chunk, *x.shape[2:]).sum(1)
        for x in (whole.dk, whole.dv)
    )
    out, dq = (x[:, -case.chunk :] for x in (whole.out, whole.dq))
    return Result(out, dq, dk, dv, whole.dsink)
