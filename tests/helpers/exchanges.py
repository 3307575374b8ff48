"""Routes of `tests.helpers.routes` with a named exchange, a layout, or both."""

import functools

import ring_swa_jax as rsj
from ring_swa_jax._layout import from_dual_order, to_dual_order
from tests.helpers import routes


def per_shard(exchange, *, check_vma=True, axes=("seq",)):
    """Route: the public per-shard functions; with two axes, the first one has two devices."""

    def build(case, implementation):
        options = dict(
            case.options,
            axis_name=axes[0] if len(axes) == 1 else axes,
            exchange=exchange,
            implementation=implementation,
        )
        sinks = {"num_sink_tokens": case.sinks} if case.sinks else {}

        def whole(q, k, v, sink, _):
            attend = rsj.ring_streaming_llm_attn if sinks else rsj.ring_sliding_window_attn
            return attend(q, k, v, sink_logits=sink, **sinks, **options)

        def packed(q, k, v, sink, ends):
            attend = rsj.ring_sliding_window_attn_varlen
            if sinks:
                attend = rsj.ring_streaming_llm_attn_varlen
            rows = q[0], k[0], v[0]
            return attend(*rows, cu_seqlens=ends, sink_logits=sink, **sinks, **options)[None]

        sizes = (case.devices,) if len(axes) == 1 else (2, case.devices // 2)
        mesh = routes.make_mesh(**dict(zip(axes, sizes, strict=True)))
        function = packed if case.packed else whole
        return routes.shard_map(function, mesh, options["axis_name"], check_vma=check_vma), mesh

    return build


def in_dual_chunk_order(function, devices):
    """The function of arrays in the order of their tokens, by one of those in the other order."""

    def call(q, k, v, sink, ids):
        q, k, v = (to_dual_order(x, devices) for x in (q, k, v))
        ids = None if ids is None else to_dual_order(ids, devices)
        return from_dual_order(function(q, k, v, sink, ids), devices)

    return call


def whole_arrays(exchange, layout="contiguous", **mesh_and_axes):
    """Route: ring_attention; as `tests.helpers.routes.over_mesh`."""

    def build(case, implementation):
        _, mesh = routes.over_mesh(**mesh_and_axes)(case, implementation)
        axes = {k: v for k, v in mesh_and_axes.items() if k not in ("axis_type", "sizes")}
        call = routes.ring_attention(case, implementation, exchange=exchange, layout=layout, **axes)
        if layout == "dual_chunk":
            call = in_dual_chunk_order(call, case.devices)
        return call, mesh

    return build


check = functools.partial(routes.check, implementation="xla")
