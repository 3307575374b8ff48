"""Bad input is answered at trace time by an error that shows the offending values."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers.errors import complains
from tests.helpers.routes import make_mesh

pytestmark = pytest.mark.usefixtures("unchecked_signatures")


def arrays(batch=2, length=12, n=4, kv=2, h=16, hv=16, dtype=jnp.float32):
    shapes = (n, h), (kv, h), (kv, hv)
    return tuple(jnp.ones((batch, length, *s), dtype) for s in shapes)


def sliding(q, k, v, **options):
    return rsj.ring_sliding_window_attn(q, k, v, **{"window_size": 3, **options})


def streaming(q, k, v, **options):
    return rsj.ring_streaming_llm_attn(q, k, v, **{"window_size": 3, **options})


def sliding_varlen(q, k, v, **options):
    options = {"window_size": 3, "cu_seqlens": jnp.array([0, 12]), **options}
    return rsj.ring_sliding_window_attn_varlen(q[0], k[0], v[0], **options)


def streaming_varlen(q, k, v, **options):
    options = {"window_size": 3, "cu_seqlens": jnp.array([0, 12]), **options}
    return rsj.ring_streaming_llm_attn_varlen(q[0], k[0], v[0], **options)


def over_mesh(q, k, v, **options):
    options = {"window_size": 3, "mesh": make_mesh(seq=2), **options}
    return rsj.ring_attention(q, k, v, **options)


def reference(q, k, v, **options):
    return rsj.reference_attention(q, k, v, **{"window_size": 3, **options})


LOCAL = [sliding, streaming, sliding_varlen, streaming_varlen]
EVERY = pytest.mark.parametrize("attend", [*LOCAL, over_mesh, reference], ids=lambda f: f.__name__)
WITH_SINKS = pytest.mark.parametrize(
    "attend", [streaming, streaming_varlen, over_mesh, reference], ids=lambda f: f.__name__
)
WITH_KERNELS = pytest.mark.parametrize("attend", [*LOCAL, over_mesh], ids=lambda f: f.__name__)


@EVERY
def test_number_of_dimensions(attend):
    q, k, v = arrays()
    varlen = attend in LOCAL[2:]
    with complains(ValueError, "(12, 16)" if varlen else "(2, 12, 16)"):
        attend(q, k[:, :, 0], v)


def test_a_batch_too_few_or_too_many():
    q, k, v = arrays()
    with complains(ValueError, "x[None]"):
        sliding(q[0], k[0], v[0])
    with complains(ValueError, "ring_attention"):
        rsj.ring_sliding_window_attn_varlen(q, k, v, window_size=5, cu_seqlens=jnp.array([0, 12]))


@EVERY
@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        (dict(length=8), dict(length=8), (12, 8)),  # other length than q
        (dict(), dict(length=8), (12, 8)),
        (dict(h=8), dict(), (16, 8)),  # other head dim than q
        (dict(kv=1), dict(), (1, 2)),  # other number of heads than v
    ],
    ids=["length", "value_length", "head_dim", "kv_heads"],
)
def test_shapes_that_do_not_fit(attend, key, value, shown):
    q, k, v = arrays()[0], arrays(**key)[1], arrays(**value)[2]
    with complains(ValueError, *shown):
        attend(q, k, v)


@pytest.mark.parametrize("attend", [sliding, over_mesh, reference], ids=lambda f: f.__name__)
def test_batch_sizes_that_differ(attend):
    q, k, v = arrays()
    with complains(ValueError, "(2, 12", "(1, 12"):
        attend(q, k[:1], v[:1])


@EVERY
def test_query_heads_not_a_multiple(attend):
    with complains(ValueError, 3, 2):
        attend(*arrays(n=3))


@EVERY
def test_dtypes_differ(attend):
    q, k, v = arrays()
    with complains(TypeError, "float32", "bfloat16"):
        attend(q, k.astype(jnp.bfloat16), v)


@EVERY
def test_integer_dtype(attend):
    with complains(TypeError, "int32"):
        attend(*arrays(dtype=jnp.int32))


@EVERY
def test_negative_window(attend):
    with complains(ValueError, "window_size", -1):
        attend(*arrays(), window_size=-1)
    with complains(ValueError, "window_size", (3, -1), "(None, None)"):
        attend(*arrays(), window_size=(3, -1))


@EVERY
@pytest.mark.parametrize("window", [2.5, "8", True, (3, 0, 0)], ids=str)
def test_window_of_another_type(attend, window):
    with complains((TypeError, ValueError), "window_size", window):
        attend(*arrays(), window_size=window)


@EVERY
def test_traced_window(attend):
    with complains((TypeError, ValueError), "window_size", "under jit"):
        jax.jit(lambda w: attend(*arrays(), window_size=w))(3)


def test_numpy_integers_are_windows():
    q, k, v = arrays()
    same = sliding(q, k, v, window_size=np.int32(3))
    np.testing.assert_array_equal(same, sliding(q, k, v))


@WITH_SINKS
def test_negative_sinks(attend):
    with complains(ValueError, "num_sink_tokens", -2):
        attend(*arrays(), num_sink_tokens=-2)


@WITH_SINKS
def test_traced_sinks(attend):
    with complains((TypeError, ValueError), "num_sink_tokens"):
        jax.jit(lambda n: attend(*arrays(), num_sink_tokens=n))(1)


def test_sinks_longer_than_a_chunk():
    with complains(ValueError, "num_sink_tokens", 7, 6, "all_to_all"):
        over_mesh(*arrays(), num_sink_tokens=7)
    assert over_mesh(*arrays(), num_sink_tokens=6).shape == (2, 12, 4, 16)
    assert streaming(*arrays(), num_sink_tokens=13).shape == (2, 12, 4, 16)


@EVERY
@pytest.mark.parametrize("cap", [0, -1.5])
def test_softcap_not_positive(attend, cap):
    with complains(ValueError, "logits_soft_cap", cap):
        attend(*arrays(), logits_soft_cap=cap)


@EVERY
@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scale_not_finite(attend, scale):
    with complains(ValueError, "scale must be finite", scale):
        attend(*arrays(), scale=scale)


@EVERY
@pytest.mark.parametrize("shape", [(2,), (1, 4), ()], ids=str)
def test_sink_logits_shape(attend, shape):
    with complains(ValueError, "sink_logits", shape, 4):
        attend(*arrays(), sink_logits=jnp.ones(shape))


@EVERY
def test_sink_logits_dtype(attend):
    with complains(TypeError, "sink_logits", "int32"):
        attend(*arrays(), sink_logits=jnp.ones(4, jnp.int32))


@pytest.mark.parametrize("attend", [sliding_varlen, streaming_varlen], ids=lambda f: f.__name__)
def test_cu_seqlens(attend):
    with complains(TypeError, "cu_seqlens", "float32"):
        attend(*arrays(), cu_seqlens=jnp.array([0.0, 12.0]))
    with complains(ValueError, "cu_seqlens", (1, 2)):
        attend(*arrays(), cu_seqlens=jnp.array([[0, 12]]))
    with complains(ValueError, "cu_seqlens", (0,)):
        attend(*arrays(), cu_seqlens=jnp.zeros((0,), jnp.int32))


@pytest.mark.parametrize("attend", [over_mesh, reference], ids=lambda f: f.__name__)
def test_segment_ids(attend):
    with complains(ValueError, "segment_ids", (2, 11)):
        attend(*arrays(), segment_ids=jnp.zeros((2, 11), jnp.int32))
    with complains(ValueError, "segment_ids", (12,), "jnp.broadcast_to(segment_ids, (2, 12))"):
        attend(*arrays(), segment_ids=jnp.zeros(12, jnp.int32))
    with complains(TypeError, "segment_ids", "bool", "jnp.where(mask, 0, -1)"):
        attend(*arrays(), segment_ids=jnp.ones((2, 12), bool))
    with complains(TypeError, "segment_ids", "float32"):
        attend(*arrays(), segment_ids=jnp.zeros((2, 12)))


@WITH_KERNELS
def test_unknown_implementation(attend):
    with complains(ValueError, "cuda_graphs", "xla"):
        attend(*arrays(), implementation="cuda_graphs")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="may be for this GPU")
@WITH_KERNELS
def test_implementation_for_another_device(attend):
    with complains(NotImplementedError, "implementation", "mosaic_gpu"):
        attend(*arrays(), implementation="mosaic_gpu")


def test_sequence_that_the_mesh_does_not_divide():
    with complains(ValueError, 13, 2, "seq"):
        over_mesh(*arrays(length=13))


def test_heads_that_the_mesh_does_not_divide():
    with complains(ValueError, "head_axis", "model", 2, 4, "fewer devices"):
        over_mesh(*arrays(n=2, kv=1), mesh=make_mesh(seq=2, model=4), head_axis="model")


def test_batch_that_the_mesh_does_not_divide():
    with complains(ValueError, 3, 2, "data"):
        over_mesh(*arrays(batch=3), mesh=make_mesh(data=2, seq=2), batch_axis="data")


@pytest.mark.parametrize(
    ("attend", "argument"),
    [
        (sliding, "axis_name"),
        (over_mesh, "seq_axis"),
        (over_mesh, "batch_axis"),
        (over_mesh, "head_axis"),
    ],
)
def test_axis_in_a_list(attend, argument):
    with complains(TypeError, argument, "a tuple of names", ["seq"]):
        attend(*arrays(), **{argument: ["seq"]})


def test_axis_used_twice():
    with complains(ValueError, "seq"):
        over_mesh(*arrays(), batch_axis="seq")


@pytest.mark.parametrize("axis", ["batch_axis", "seq_axis", "head_axis"])
def test_axis_that_the_mesh_lacks(axis):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning about the misspelt axis would only distract
        with complains(ValueError, axis, "rows", "seq", "name one of these"):
            over_mesh(*arrays(), **{axis: "rows"})


@pytest.mark.parametrize("jit", [False, True])
def test_forgotten_set_mesh(jit):
    attend = jax.jit(rsj.ring_attention) if jit else rsj.ring_attention
    with complains(ValueError, "seq", "none is set", "set_mesh"):
        attend(*arrays())


@pytest.mark.parametrize("attend", LOCAL, ids=lambda f: f.__name__)
def test_unknown_axis_name_in_shard_map(attend):
    spec = P(None, "seq")
    local = jax.shard_map(
        lambda q, k, v: attend(q, k, v, axis_name="ring"),
        mesh=make_mesh(seq=2), in_specs=spec, out_specs=P("seq"),
    )  # fmt: skip
    with complains((ValueError, NameError), "ring", "seq"):
        local(*arrays())


def test_axis_name_outside_of_shard_map():
    with complains((ValueError, NameError), "seq"):
        sliding(*arrays(), axis_name="seq")
