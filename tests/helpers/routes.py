"""The ways to call the operation. `check(case, route)` runs a case and compares with the oracle.

A route builds `f(q, k, v, sink_logits, documents) -> out` on whole arrays [B, S, ...], and the mesh
it runs on (None: one device).
"""

import contextlib
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers.oracle import Result

SEQUENCE = P(None, "seq")
# (relative, absolute): ||got - ref|| <= relative * ||ref|| + absolute * sqrt(size)
TOLERANCE = {"float32": (2e-5, 1e-6), "bfloat16": (1e-2, 1e-3), "float16": (2e-3, 2e-4)}


def make_mesh(axis_type=AxisType.Auto, **axes):
    """Mesh of the first devices, e.g. make_mesh(data=2, seq=4)."""
    count = math.prod(axes.values())
    if count > len(jax.devices()):
        pytest.skip(f"needs {count} devices")
    shape, names = tuple(axes.values()), tuple(axes)
    types = (axis_type,) * len(axes)
    return jax.make_mesh(shape, names, axis_types=types, devices=jax.devices()[:count])


def per_shard(case, axis_name, implementation):
    """f(q, k, v, sink, cu_seqlens) on one shard, by the public function that fits the case."""
    options = dict(case.options, axis_name=axis_name, implementation=implementation)
    if case.sinks:
        options["num_sink_tokens"] = case.sinks

    def whole(q, k, v, sink, _):
        attend = rsj.ring_streaming_llm_attn if case.sinks else rsj.ring_sliding_window_attn
        return attend(q, k, v, sink_logits=sink, **options)

    def packed(q, k, v, sink, cu):
        sliding, streaming = rsj.ring_sliding_window_attn_varlen, rsj.ring_streaming_llm_attn_varlen
        attend = streaming if case.sinks else sliding
        return attend(q[0], k[0], v[0], cu_seqlens=cu, sink_logits=sink, **options)[None]

    return packed if case.packed else whole


def shard_map(function, mesh, axis_name, *, check_vma=True, batch=None, head=None):
    """The user's own jax.shard_map around a per-shard function."""
    spec = P(batch, axis_name, head)
    in_specs = (spec, spec, spec, P(head), P())
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=check_vma
    )


def over_ring(check_vma):
    """Route: per-shard function inside shard_map over case.devices devices."""

    def build(case, implementation):
        mesh = make_mesh(seq=case.devices)
        function = per_shard(case, "seq", implementation)
        return shard_map(function, mesh, "seq", check_vma=check_vma), mesh

    return build


def over_tuple(case, implementation):
    """Route: per-shard function, the sequence over two mesh axes (major first)."""
    mesh = make_mesh(outer=2, inner=case.devices // 2)
    axes = ("outer", "inner")
    return shard_map(per_shard(case, axes, implementation), mesh, axes), mesh


def one_device(case, implementation):
    """Route: per-shard function with axis_name=None, without any mesh."""
    return per_shard(case, None, implementation), None


def ring_attention(case, implementation, **where):
    """f on global arrays, by rsj.ring_attention."""
    options = dict(case.options, implementation=implementation, num_sink_tokens=case.sinks)

    def call(q, k, v, sink, ids):
        return rsj.ring_attention(q, k, v, sink_logits=sink, segment_ids=ids, **options, **where)

    return call


def over_mesh(axis_type=AxisType.Auto, sizes=None, **axes):
    """Route: ring_attention under jax.set_mesh; `sizes` of the mesh, None for case.devices."""

    def build(case, implementation):
        mesh = make_mesh(axis_type, **(sizes or dict(seq=case.devices)))
        return ring_attention(case, implementation, **axes), mesh

    return build


def dense(case, implementation):
    """Route: reference_attention."""

    def call(q, k, v, sink, ids):
        options = dict(case.options, num_sink_tokens=case.sinks)
        return rsj.reference_attention(q, k, v, sink_logits=sink, segment_ids=ids, **options)

    return call, None


ROUTES = {
    "one_device": one_device,
    "shard": over_ring(check_vma=True),
    "shard_novma": over_ring(check_vma=False),
    "shard_tuple": over_tuple,
    "global": over_mesh(),
    "global_explicit": over_mesh(AxisType.Explicit),
    "global_local": over_mesh(sizes=dict(other=1), seq_axis=None),
    "reference": dense,
}


def routes_of(case):
    """Names of the `ROUTES` that can run the case."""
    routes = []
    if case.packed or case.documents is None:
        routes += ["shard", "shard_novma"]
        routes += ["one_device"] if case.devices == 1 else []
        routes += ["shard_tuple"] if case.devices % 2 == 0 else []
    if not case.packed:
        routes += ["global", "global_explicit"]
        routes += ["global_local", "reference"] if case.devices == 1 else []
    return routes


def route_of(case):
    """One of them, chosen by the case's seed."""
    return random.Random(repr(case)).choice(routes_of(case))


def documents_of(case):
    """What the route takes as documents: cu_seqlens, segment_ids or None."""
    if case.documents is None:
        return None
    return jnp.asarray(case.cu_seqlens() if case.packed else case.segment_ids())


def with_gradients(function):
    """(q, k, v, sink, documents, dout) -> Result, all in one program."""

    def program(q, k, v, sink, documents, dout):
        out, pull = jax.vjp(lambda *x: function(*x, documents), q, k, v, sink)
        return Result(out, *pull(dout))

    return program


def place(mesh, spec, *arrays):
    """Puts [B, S, heads, dim] arrays on an Explicit mesh; leaves them alone elsewhere."""
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return arrays
    return tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays)


def run(case, route, implementation="xla", *, spec=SEQUENCE, jit=True, optimize=False):
    """Result of the case by a route: a name in ROUTES, or a builder like those.

    Compiling is most of a test's time, so LLVM optimizes only if told to (XLA always does).
    """
    build = ROUTES[route] if isinstance(route, str) else route
    function, mesh = build(case, implementation)
    (q, k, v, sink), dout = case.arrays()
    documents = documents_of(case)
    program = with_gradients(function)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        q, k, v, dout = place(mesh, spec, q, k, v, dout)
        arguments = (q, k, v, sink, documents, dout)
        if jit:
            quick = jax.default_backend() == "cpu" and not optimize
            options = {"xla_backend_optimization_level": 0} if quick else None
            program = jax.jit(program).lower(*arguments).compile(compiler_options=options)
        result = program(*arguments)
        return Result(*jax.device_get(tuple(result)))


def compare(result, expected, dtype, case=None):
    """Asserts the issue's error bound for out, dq, dk, dv and dsink; shows the case otherwise."""
    relative, absolute = TOLERANCE[dtype]
    for name, got, ref in zip(Result._fields, result, expected, strict=True):
        if ref is None:
            continue
        got = np.asarray(got).astype(np.float64)
        assert got.shape == ref.shape, f"{name}: shape {got.shape}, not {ref.shape}\n{case}"
        assert np.isfinite(got).all(), f"{name}: not finite\n{case}"
        error = np.linalg.norm(got - ref)
        size = ref.size
        if name == "dsink" and dtype != "float32":
            # Each element of a query's output adds its rounding.
            size = math.prod(expected.out.shape) // expected.out.shape[2]
        bound = relative * np.linalg.norm(ref) + absolute * math.sqrt(size)
        worst = np.unravel_index(np.abs(got - ref).argmax(), ref.shape) if ref.size else ()
        assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}, worst at {worst}\n{case}"


def check(case, route, implementation="xla", **settings):
    """Runs the case by the route and compares output and gradients with the oracle."""
    result = run(case, route, implementation, **settings)
    assert result.out.dtype == result.dq.dtype == jnp.dtype(case.dtype), case
    compare(result, case.expected, case.dtype, f"{case} by {route}")
