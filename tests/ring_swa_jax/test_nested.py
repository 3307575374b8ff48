"""`ring_attention` inside a shard_map of its caller over the other axes of the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers.layers import quick
from tests.helpers.routes import make_mesh

Q, K, V = jax.random.normal(jax.random.key(0), (3, 4, 16, 2, 16))
SINK_LOGITS = jnp.array([0.3, -0.2])
IDS = jnp.arange(16)[None] // jnp.array([3, 5, 7, 40])[:, None]
SPECS = (P("data"), P("data"), P("data"), P("data"), P())


def attend(attention):
    def call(q, k, v, segment_ids, sink_logits):
        options = dict(segment_ids=segment_ids, sink_logits=sink_logits)
        return attention(q, k, v, window_size=5, num_sink_tokens=2, **options)

    return call


def gradients(function, *arrays):
    q, k, v, segment_ids, sink_logits = arrays
    floats = lambda q, k, v, s: (function(q, k, v, segment_ids, s) ** 3).sum()  # noqa: E731
    return jax.grad(floats, argnums=(0, 1, 2, 3))(q, k, v, sink_logits)


def outside(function, check_vma):
    mapped = jax.shard_map(
        function, in_specs=SPECS, out_specs=P("data"), axis_names={"data"}, check_vma=check_vma
    )
    return lambda *arrays: gradients(mapped, *arrays)


def inside(function, check_vma):
    def body(*arrays):
        dq, dk, dv, dsink = gradients(function, *arrays)
        return dq, dk, dv, dsink if check_vma else jax.lax.psum(dsink, "data")

    return jax.shard_map(
        body,
        in_specs=SPECS,
        out_specs=(*SPECS[:3], P()),
        axis_names={"data"},
        check_vma=check_vma,
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("where", "kind", "check_vma"),
    [
        pytest.param(outside, AxisType.Auto, True, marks=SLOW),
        (inside, AxisType.Explicit, True),
        pytest.param(inside, AxisType.Auto, True, marks=SLOW),
        pytest.param(outside, AxisType.Explicit, True, marks=SLOW),
        pytest.param(outside, AxisType.Auto, False, marks=SLOW),
        pytest.param(inside, AxisType.Explicit, False, marks=SLOW),
    ],
)
def test_gradients(where, kind, check_vma):
    arrays = (Q, K, V, IDS, SINK_LOGITS)
    right = gradients(attend(rsj.reference_attention), *arrays)
    mesh = make_mesh(kind, data=2, seq=4)
    with jax.set_mesh(mesh):
        cut = [
            jax.device_put(x, jax.NamedSharding(mesh, s))
            for x, s in zip(arrays, SPECS, strict=True)
        ]
        got = quick(where(attend(rsj.ring_attention), check_vma))(*cut)
    for x, y in zip(got, right, strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5)
