"""Attention on global arrays: makes the shard_map around the per-shard function."""

import math
from collections.abc import Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

import pallas_kernels
from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._attend_chunk import attend_chunk
from ring_swa_jax._axis import AxisName, SequenceAxis, names_of, reshard, vmapped_axes
from ring_swa_jax._exchange import check_exchange
from ring_swa_jax._integers import as_segment_ids
from ring_swa_jax._layout import check_halves, check_layout
from ring_swa_jax._mesh_axes import MeshAxes
from ring_swa_jax._nested import nested_shard_map, varying_outside
from ring_swa_jax._window import WindowSize, static_window


def ring_attention(
    q: Float[AnyArray, "B S N H"],
    k: Float[AnyArray, "B S K H"],
    v: Float[AnyArray, "B S K Hv"],
    *,
    window_size: WindowSize = None,
    num_sink_tokens: int = 0,
    segment_ids: Int[AnyArray, "B S"] | None = None,
    sink_logits: Float[AnyArray, "N"] | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    seq_axis: AxisName | None = "seq",
    batch_axis: AxisName | None = None,
    head_axis: AxisName | None = None,
    layout: str = "contiguous",
    exchange: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "B S N Hv"]:
    r"""Sliding-window and streaming-LLM attention of whole sequences over the devices of a mesh.

    Query i attends key j of its own sequence, which starts at s, iff ``j <= i`` and
    (``i - j <= window_size`` or ``j - s < num_sink_tokens``):

    .. math:: o_i = \frac{\sum_j e^{s_{ij}} v_j}{e^{z} + \sum_j e^{s_{ij}}}

    with :math:`s_{ij} = q_i \cdot k_j \cdot \mathrm{scale}`, softly capped, and :math:`e^z` only
    where there are ``sink_logits``. The sequence is cut over ``seq_axis``; under a window each
    device receives only the keys that its windows reach. Works in and out of jit.

    Args:
        q: queries of whole rows.
        k: keys; N is a multiple of K. Heads that the devices of ``head_axis`` do not divide are
            repeated.
        v: values, in the dtype of q and k.
        window_size: W; a query sees **W + 1 keys**: the W before it and itself, as
            FlashAttention's ``(W, 0)``. Hugging Face's ``sliding_window=n`` is ``n - 1`` here.
            None: all keys before it. A pair (L, R): L before and R after it, None for no bound;
            (None, None) is full attention, not causal. Static.
        num_sink_tokens: how many first tokens of its own sequence a query always sees; at most a
            chunk on several devices, except with exchange="all_to_all". Static.
        segment_ids: of any integer dtype; a new sequence starts where the id changes; a negative
            id is padding, with zeros as result and gradient.
        sink_logits: one learned logit for each query head, in the softmax's denominator alone.
        logits_soft_cap: logits become ``cap * tanh(logits / cap)``.
        scale: factor of ``q.k``, by default ``H**-0.5``.
        mesh: by default that of ``jax.set_mesh``.
        seq_axis: mesh axis that cuts the sequence, or a tuple of axes, major first; None: every
            device has the whole sequence.
        batch_axis: mesh axis or axes that cut the batch. On Explicit mesh axes None means what
            the sharding of q says.
        head_axis: mesh axis or axes that cut the heads, likewise.
        layout: the order of the tokens in q, k, v, ``segment_ids`` and the result: "contiguous",
            or "dual_chunk", where device r of P holds half chunks r and 2P-1-r (the load balancing
            of MaxText and Transformer Engine).
        exchange: how keys get to the devices whose queries see them. "halo": a device receives the
            keys that its windows reach. "all_to_all": it receives the whole sequence of its share
            of the heads; the number of devices must divide the query heads. "ring": all keys visit
            all devices, for windows that lack a bound. None: "all_to_all" without a window and
            for a long one (docs/how_it_works.md has the rule), where possible and the axis lies
            within one host; else "halo" for a window with both bounds, "ring" for others.
        implementation: "xla", "triton", "mosaic_gpu", "mosaic_gpu_nondeterministic", or None for
            the best deterministic one here.

    Returns:
        The attended values, in the dtype of q, cut over the mesh as q.

    Raises:
        ValueError: shapes, head counts, axes, windows, layouts or names that do not fit, or an
            axis that no mesh has.
        TypeError: dtypes that differ or are not floating-point, settings that are not static.
        NotImplementedError: the named implementation cannot do this.

    References:
        Beltagy, Peters and Cohan, Longformer, arXiv:2004.05150; Xiao et al., Efficient Streaming
        Language Models with Attention Sinks, arXiv:2309.17453; Liu, Zaharia and Abbeel, Ring
        Attention, arXiv:2310.01889.
    """
    q, k, v = (_checks.as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    _checks.check_heads(q, k, v)
    if segment_ids is not None:
        segment_ids = as_segment_ids(segment_ids, q.shape[:2])
    if sink_logits is not None:
        sink_logits = _checks.as_array("sink_logits", sink_logits)
        _checks.check_sink_logits(sink_logits, q.shape[2])
    check_layout(layout)
    check_exchange(exchange)
    axes = MeshAxes.resolve(q, mesh, seq_axis, batch_axis, head_axis)
    check_halves(layout, q.shape[1], axes.size(axes.seq))
    return _sharded_attention(
        q,
        k,
        v,
        segment_ids,
        sink_logits,
        axes=axes,
        window_size=static_window(window_size),
        num_sink_tokens=_checks.static_sinks(num_sink_tokens),
        logits_soft_cap=_checks.static_soft_cap(logits_soft_cap),
        scale=_checks.static_scale(scale, q.shape[-1]),
        layout=layout,
        exchange=exchange,
        implementation=implementation,
    )


@partial(
    jax.jit,
    static_argnames=(
        "axes",
        "window_size",
        "num_sink_tokens",
        "logits_soft_cap",
        "scale",
        "layout",
        "exchange",
        "implementation",
    ),
)
def _sharded_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    segment_ids: Int[Array, "B S"] | None,
    sink_logits: Float[Array, "N"] | None,
    *,
    axes: MeshAxes,
    **settings: Any,
) -> Float[Array, "B S N Hv"]:
    def attend(q, k, v, segment_ids, sink_logits):
        axis = SequenceAxis.named(axes.seq)
        return attend_chunk(
            q, k, v, axis=axis, segment_ids=segment_ids, sink_logits=sink_logits, **settings
        )

    if axes.mesh is None:
        return attend(q, k, v, segment_ids, sink_logits)
    k, v = (_repeat_heads(x, axes) for x in (k, v))
    arrays: tuple[Array | None, ...] = (q, k, v, segment_ids, sink_logits)
    heads = P(axes.batch, axes.seq, axes.head)
    specs = (heads, heads, heads, P(axes.batch, axes.seq), P(axes.head))
    in_specs = tuple(None if x is None else s for x, s in zip(arrays, specs, strict=True))
    if explicit := axes.explicit_axes():
        arrays = tuple(
            None if x is None else reshard(x, axes.mesh, only(s, explicit))
            for x, s in zip(arrays, specs, strict=True)
        )
    manual = set(jax.sharding.get_abstract_mesh().manual_axes)
    shard_map: dict[str, Any] = dict(
        mesh=axes.mesh,
        in_specs=in_specs,
        out_specs=heads,
        axis_names=set(axes.mesh.axis_names) - manual,
        check_vma=not (pallas_kernels.interprets(settings["implementation"]) or vmapped_axes()),
    )
    if varying_outside(arrays):
        return nested_shard_map(attend, arguments=arrays, **shard_map)
    return jax.shard_map(attend, **shard_map)(*arrays)


def _repeat_heads(x: Float[Array, "B S K H"], axes: MeshAxes) -> Float[Array, "B S R H"]:
    """Keys or values with each head as often as the devices of the head axis need it.

    R is the least common multiple of K and the devices, which divides N as both do.
    """
    times = math.lcm(x.shape[2], axes.size(axes.head)) // x.shape[2]
    if axes.mesh is None or times == 1:
        return x
    if explicit := axes.explicit_axes():  # JAX does not repeat along a dimension that is cut
        x = reshard(x, axes.mesh, only(P(axes.batch, axes.seq), explicit))
    return jnp.repeat(x, times, axis=2)


def only(spec: P, names: set[Hashable]) -> P:
    """The spec with the other axes dropped."""
    kept = [tuple(name for name in names_of(axis) if name in names) or None for axis in spec]
    return P(*kept)
