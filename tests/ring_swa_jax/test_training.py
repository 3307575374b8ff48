"""Three steps of training over a mesh give the losses of one device; checkpoints move between."""

import contextlib
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax.linen
import ring_swa_jax.nnx
from tests.helpers.routes import make_mesh

VOCABULARY, E, B, S = 13, 16, 2, 32
SIZES = dict(num_heads=4, in_features=E, num_kv_heads=2, head_dim=8, use_bias=False)
KINDS = {
    "local": dict(
        SIZES, window_size=5, num_sink_tokens=2, learned_sinks=True, rope=ring_swa_jax.Rope()
    ),
    "full": dict(SIZES, window_size=None, rope=ring_swa_jax.Rope()),
}
MESHES = {
    "one device": {},
    "seq": dict(data=1, seq=8),
    "data_seq": dict(data=2, seq=4),
    "data_seq_heads": dict(data=2, seq=2, model=2),
}
STEPS = 3


def axes(mesh):
    """Settings that name the mesh's axes."""
    if not MESHES[mesh]:
        return dict(seq_axis=None)
    return dict(batch_axis="data", head_axis="model" if "model" in MESHES[mesh] else None)


def logits(embedding, layers, tokens, ids):
    """A Transformer without feed-forward networks, the embedding also its head."""
    x = jax.nn.one_hot(tokens, VOCABULARY) @ embedding
    for layer in layers:
        normal = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        x = x + layer(normal, segment_ids=ids)
    return x @ embedding.T


class NnxModel(nnx.Module):
    def __init__(self, mesh):
        make = ring_swa_jax.nnx.RingSlidingWindowAttention
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Param(jnp.zeros((VOCABULARY, E)))
        self.local = make(**KINDS["local"], **axes(mesh), rngs=rngs)
        self.full = make(**KINDS["full"], **axes(mesh), rngs=rngs)

    def __call__(self, tokens, ids):
        return logits(self.embedding[...], (self.local, self.full), tokens, ids)


class LinenModel(nn.Module):
    mesh: str

    @nn.compact
    def __call__(self, tokens, ids):
        make = ring_swa_jax.linen.RingSlidingWindowAttention
        embedding = self.param("embedding", nn.initializers.zeros, (VOCABULARY, E))
        layers = [make(**kind, **axes(self.mesh), name=name) for name, kind in KINDS.items()]
        return logits(embedding, layers, tokens, ids)


def batches():
    """Of every step (tokens, targets, segment_ids); documents end on and beside chunks' edges."""
    rng = np.random.default_rng(0)
    ids = np.array([[0] * 13 + [1] * 3 + [2] * 12 + [-1] * 4, [7] * 24 + [8] * 8])
    last = (ids < 0) | (np.diff(ids, axis=1, append=-2) != 0)
    draws = [rng.integers(0, VOCABULARY, (B, S)) for _ in range(STEPS + 1)]
    return [(tokens, np.where(last, -1, np.roll(tokens, -1, 1)), ids) for tokens in draws]


def cross_entropy(logits, targets):
    """Mean over the tokens that have a target: one_hot has only zeros for the others."""
    picked = jax.nn.log_softmax(logits) * jax.nn.one_hot(targets, VOCABULARY)
    return -picked.sum() / (targets >= 0).sum()


@functools.cache
def parameters():
    """Random parameters, the same in both frameworks."""
    abstract = nnx.eval_shape(lambda: nnx.state(NnxModel("one device"), nnx.Param))
    rng = np.random.default_rng(1)
    draw = lambda p: jnp.asarray(rng.standard_normal(p.shape) / 3, jnp.float32)  # noqa: E731
    return jax.tree.map(draw, nnx.to_pure_dict(abstract))


TRANSFORM = optax.adamw(1e-2)


def start_nnx(mesh):
    """State of model and optimizer, and step(state, tokens, targets, ids) -> (state, loss)."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: NnxModel(mesh)))
    nnx.replace_by_pure_dict(abstract, parameters())
    model = nnx.merge(graph, abstract)
    optimizer = nnx.Optimizer(model, TRANSFORM, wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state, tokens, targets, ids):
        model, optimizer = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(
            lambda model: cross_entropy(model(tokens, ids), targets)
        )(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    return state, step


def start_linen(mesh):
    """The same with a TrainState."""
    apply = LinenModel(mesh).apply
    state = TrainState.create(apply_fn=apply, params=parameters(), tx=TRANSFORM)
    state = state.replace(step=jnp.int32(0))  # the weak type of 0 would not survive a checkpoint

    def step(state, tokens, targets, ids):
        def loss(params):
            return cross_entropy(apply({"params": params}, tokens, ids), targets)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    return state, step


def shardings(state, name, kind=AxisType.Auto):
    """Of every array of a state on a mesh: heads over "model", in the optimizer's moments too."""
    if not MESHES[name]:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), state)
    mesh = make_mesh(kind, **MESHES[name])

    def sharding(path, _):
        spec = P()
        if "model" in MESHES[name]:
            path = jax.tree_util.keystr(path)
            if "kernel" in path:
                spec = P("model") if "out" in path else P(None, "model")
            elif "sink_logits" in path:
                spec = P("model")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


class Trainer(NamedTuple):
    """A step compiled for a mesh, and a state placed on it."""

    context: Any
    state: Any
    step: Any
    batches: list

    def train(self, state, batches):
        """(state, losses) after a step with each of the batches."""
        losses = []
        for batch in batches:
            with self.context():
                state, loss = self.step(state, *batch)
            losses.append(float(loss))
        return state, losses


@functools.cache
def trainer(start, name, kind=AxisType.Auto):
    state, step = start(name)
    places = shardings(state, name, kind)
    step = jax.jit(
        step,
        out_shardings=(places, None),
        # Compiling is most of the time.
        compiler_options={"xla_backend_optimization_level": 0},
    )
    state = jax.device_put(state, places)
    if not MESHES[name]:
        return Trainer(contextlib.nullcontext, state, step, batches())
    mesh = make_mesh(kind, **MESHES[name])
    placed = jax.device_put(batches(), NamedSharding(mesh, P("data", "seq")))
    return Trainer(functools.partial(jax.set_mesh, mesh), state, step, placed)


@functools.cache
def trained(*where):
    """State and losses after the steps."""
    run = trainer(*where)
    return run.train(run.state, run.batches[:STEPS])


@functools.cache
def next_loss():
    """That of one more step on one device."""
    run = trainer(start_nnx, "one device")
    return run.train(trained(start_nnx, "one device")[0], run.batches[STEPS:])[1]


LINEN, NNX = start_linen, start_nnx
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("start", "mesh", "kind"),
    [
        (NNX, "data_seq_heads", AxisType.Explicit),
        slow(LINEN, "data_seq", AxisType.Auto),
        slow(NNX, "data_seq", AxisType.Auto),
        slow(NNX, "data_seq", AxisType.Explicit),
        slow(NNX, "data_seq_heads", AxisType.Auto),
        slow(LINEN, "data_seq", AxisType.Explicit),
        slow(LINEN, "data_seq_heads", AxisType.Auto),
        slow(LINEN, "data_seq_heads", AxisType.Explicit),
        slow(LINEN, "one device", AxisType.Auto),
    ],
)
def test_losses_are_those_of_one_device(start, mesh, kind):
    _, want = trained(NNX, "one device")
    _, got = trained(start, mesh, kind)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.abs(np.diff(want)).min() > 1e-2


@pytest.mark.parametrize(
    ("start", "saved_on", "restored_on"),
    [
        (NNX, ("data_seq", AxisType.Auto), ("data_seq_heads", AxisType.Explicit)),
        (NNX, ("data_seq_heads", AxisType.Explicit), ("one device",)),
        slow(LINEN, ("seq", AxisType.Auto), ("data_seq", AxisType.Auto)),
        slow(NNX, ("one device",), ("data_seq", AxisType.Auto)),
        slow(LINEN, ("data_seq", AxisType.Auto), ("data_seq_heads", AxisType.Explicit)),
        slow(LINEN, ("data_seq_heads", AxisType.Explicit), ("one device",)),
    ],
)
def test_checkpoints_move_between_meshes(start, saved_on, restored_on, tmp_path):
    state, _ = trained(start, *restored_on)
    run = trainer(start, *restored_on)
    with ocp.StandardCheckpointer() as checkpointer:
        path = tmp_path / "checkpoint"
        checkpointer.save(path, jax.device_put(state, shardings(state, *saved_on)))
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, run.state)
        restored = checkpointer.restore(path, target)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(run.state), strict=True):
        assert got.sharding == want.sharding
    _, losses = run.train(restored, run.batches[STEPS:])
    np.testing.assert_allclose(losses, next_loss(), rtol=1e-5)
