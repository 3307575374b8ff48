"""The kernels as they ship, on the GPU that is here: against cuDNN's rounding, at real shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ring_swa_jax as rsj
from tests.helpers.cases import Case
from tests.helpers.models import MODELS, Model
from tests.helpers.oracle import Result
from tests.helpers.pool import compiled, prepared
from tests.helpers.refusals import result_unless_refused
from tests.helpers.routes import compare, per_shard

pytestmark = pytest.mark.gpu
KERNELS = ("triton", "mosaic_gpu")


@dataclasses.dataclass(frozen=True)
class BesideCudnn:
    """The same bfloat16 data for an implementation and for cuDNN."""

    dim: int
    window: int
    implementation: str

    def prepare(self):
        """(ours, cuDNN's, their arguments, the float64 oracle's Result)."""
        case = Case(2048, 1, self.window, heads=(2, 1), dims=(self.dim,) * 2, dtype="bfloat16")
        inputs, dout = case.arrays()
        arguments = (*inputs, None, dout)

        def cudnn(q, k, v, sink, documents):
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=(self.window, 0), implementation="cudnn"
            )

        ours = per_shard(case, None, self.implementation)
        return compiled(ours, arguments), compiled(cudnn, arguments), arguments, case.expected


@dataclasses.dataclass(frozen=True)
class AtModel:
    """A model's layer at its own window, its heads cut down to one or two groups."""

    model: Model
    implementation: str

    def prepare(self):
        """(ours, the dense reference in float32, their arguments)."""
        model, rng = self.model, np.random.default_rng(0)
        group = model.heads[0] // model.heads[1]
        kv_heads = 2 if group < 3 else 1
        length = -(-((model.window or 1500) + 700) // 8) * 8  # what all implementations take
        (dim, value_dim), heads = model.dims, group * kv_heads
        q, k, v, dout = (
            jnp.asarray(rng.standard_normal((1, length, *dims), np.float32), jnp.bfloat16)
            for dims in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim))
        )
        sink = jnp.asarray(rng.standard_normal(heads), jnp.float32) if model.learned else None
        options = dict(window_size=model.window, logits_soft_cap=model.softcap)

        def ours(q, k, v, sink, documents):
            return rsj.ring_sliding_window_attn(
                q, k, v, sink_logits=sink, implementation=self.implementation, **options
            )

        def dense(q, k, v, sink, documents):
            q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
            return rsj.reference_attention(q, k, v, sink_logits=sink, **options)

        arguments = (q, k, v, sink, None)
        with jax.default_matmul_precision("highest"):
            reference = compiled(dense, (*arguments, dout.astype(jnp.float32)))
        return compiled(ours, (*arguments, dout)), reference, (*arguments, dout)


@pytest.fixture(scope="module")
def programs(request):
    """Futures of the selected jobs' programs."""
    with prepared(request, threads=16) as futures:
        yield futures


def error(got, expected):
    """Relative norms of the differences of out, dq, dk and dv."""
    return [
        np.linalg.norm(np.asarray(x).astype(np.float64) - ref) / np.linalg.norm(ref)
        for x, ref in zip(got[:4], expected[:4], strict=True)
    ]


@pytest.mark.parametrize(
    "job",
    [BesideCudnn(dim, w, name) for dim in (64, 128) for w in (127, 1023) for name in KERNELS],
    ids=lambda job: f"H{job.dim}-W{job.window}-{job.implementation}",
)
def test_bfloat16_error_is_at_most_cudnns(job, programs):
    prepared_job = result_unless_refused(programs[job], job.implementation, "bfloat16")
    if prepared_job is None:
        return
    ours, cudnn, arguments, expected = prepared_job
    mine, theirs = error(ours(*arguments), expected), error(cudnn(*arguments), expected)
    print([f"{a:.2e} {b:.2e} {a / b:.3f}" for a, b in zip(mine, theirs, strict=True)])
    for name, a, b in zip(Result._fields, mine, theirs, strict=False):
        assert a <= 1.05 * b, f"{name}: {a:.3g}, cuDNN {b:.3g}"


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(AtModel(model, implementation), id=f"{name}-{implementation}")
        for name, model in MODELS.items()
        for implementation in KERNELS
    ],
)
def test_default_tiles_at_the_models_windows(job, programs):
    prepared_job = result_unless_refused(programs[job], job.implementation, "bfloat16")
    if prepared_job is None:
        return
    ours, reference, arguments = prepared_job
    *inputs, dout = arguments
    expected = Result(
        *(
            None if x is None else np.asarray(x).astype(np.float64)
            for x in reference(*inputs, dout.astype(jnp.float32))
        )
    )
    compare(Result(*ours(*arguments)), expected, "bfloat16", job)
