"""The Flax layers under remat and scan: what runs twice, and what is kept for the backward pass."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax.linen
import ring_swa_jax.nnx
from tests.helpers.routes import make_mesh

POLICIES = {
    "none": None,
    "context": jax.checkpoint_policies.save_only_these_names("context"),
    "nothing": jax.checkpoint_policies.nothing_saveable,
}
KINDS = {
    "local": dict(window_size=3, learned_sinks=True, rope=ring_swa_jax.Rope()),
    "global": dict(window_size=None, rope=None),
}
FIVE_TO_ONE = ("local",) * 5 + ("global",)
ONE_TO_ONE = ("local", "global")
REPEATS = 2  # of the pattern
E = 16
SIZES = dict(num_heads=2, in_features=E, num_kv_heads=1, head_dim=16, use_bias=False)

# Compiling is most of the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class NnxBlock(nnx.Module):
    """A pattern of layers, which a scan repeats."""

    def __init__(self, pattern, *, rngs, **settings):
        make = functools.partial(ring_swa_jax.nnx.RingSlidingWindowAttention, **SIZES, **settings)
        self.layers = nnx.List(make(**KINDS[kind], rngs=rngs) for kind in pattern)


def residual(layer, x):
    return x + layer(x)


def through_nnx(policy, pattern, **settings):
    """The abstract parameters of the stack, and f(parameters, x)."""
    create = nnx.vmap(lambda rngs: NnxBlock(pattern, rngs=rngs, **settings), in_axes=0)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0).split(REPEATS))))
    layer = residual if policy is None else nnx.remat(residual, policy=policy)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def blocks(block, x):
        for attention in block.layers:
            x = layer(attention, x)
        return x

    return abstract, lambda state, x: blocks(nnx.merge(graph, state), x)


def through_linen(policy, pattern, **settings):
    """The same by the Linen module."""
    make = ring_swa_jax.linen.RingSlidingWindowAttention
    make = make if policy is None else nn.remat(make, policy=policy)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            for kind in pattern:
                x = residual(make(**SIZES, **KINDS[kind], **settings), x)
            return x, None

    blocks = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=REPEATS,
    )()
    abstract = jax.eval_shape(blocks.init, jax.random.key(0), features(), None)
    return abstract, lambda variables, x: blocks.apply(variables, x, None)[0]


def features():
    return np.random.default_rng(0).standard_normal((2, 16, E)).astype(np.float32)


def loss_of(apply):
    def loss(parameters, x):
        return (apply(parameters, x) ** 2).mean()

    return loss


def equations(program):
    """How often each primitive, and each Pallas kernel by name, stands in a jaxpr."""
    count = collections.Counter()

    def visit(value):
        if isinstance(value, tuple | list):
            for item in value:
                visit(item)
        elif hasattr(value, "eqns"):
            for equation in value.eqns:
                if equation.primitive.name == "pallas_call":
                    count[equation.params["name"]] += 1
                else:
                    count[equation.primitive.name] += 1
                    visit(list(equation.params.values()))
        elif hasattr(value, "jaxpr"):
            visit(value.jaxpr)

    visit(program)
    return count


@pytest.mark.parametrize("through", [through_nnx, through_linen])
def test_saving_context_runs_the_attention_once(through):
    """Once in the scanned body, which stands for all repeats; without the names, twice."""
    layers = len(FIVE_TO_ONE)
    for policy, runs in (("none", 1), ("context", 1), ("nothing", 2)):
        settings = dict(seq_axis=None, implementation="triton")
        abstract, apply = through(POLICIES[policy], FIVE_TO_ONE, **settings)
        count = equations(jax.make_jaxpr(jax.grad(loss_of(apply)))(abstract, features()))
        assert count["ring_swa_forward"] == runs * layers, policy
        assert count["ring_swa_backward_query"] == layers


def test_saving_context_over_a_mesh_costs_one_more_permute():
    """The halo is not kept but fetched again; the attention is not."""
    counts = {}
    for policy in POLICIES:
        settings = dict(implementation="triton")
        abstract, apply = through_nnx(POLICIES[policy], ("local",), **settings)
        with jax.set_mesh(make_mesh(seq=2)):
            program = jax.make_jaxpr(jax.grad(loss_of(apply)))(abstract, features())
        counts[policy] = equations(program)
    forward = {policy: count["ring_swa_forward"] for policy, count in counts.items()}
    assert forward["context"] == forward["none"] == forward["nothing"] / 2 > 0
    permutes = [counts[policy]["ppermute"] for policy in ("none", "context", "nothing")]
    assert permutes == [2, 3, 3]  # there, home and, if not kept, there again


@pytest.mark.parametrize(
    "pattern", [ONE_TO_ONE, pytest.param(FIVE_TO_ONE, marks=pytest.mark.slow)], ids=len
)
def test_scan_over_a_pattern_of_layers(pattern):
    """Its loss and gradients over a mesh are those of the layers one after the other."""
    abstract, scanned = through_nnx(POLICIES["context"], pattern)
    rng = np.random.default_rng(1)
    draw = lambda p: jnp.asarray(rng.standard_normal(p.shape) / 8, jnp.float32)  # noqa: E731
    state = jax.tree.map(draw, abstract)
    block = nnx.eval_shape(lambda: NnxBlock(pattern, seq_axis=None, rngs=nnx.Rngs(0)))

    def unrolled(state, x):
        for i in range(REPEATS):
            for j, layer in enumerate(block.layers):
                parameters = jax.tree.map(lambda p, i=i: p[i], state["layers"][j])
                x = residual(nnx.merge(nnx.graphdef(layer), parameters), x)
        return x

    want = quick(jax.value_and_grad(loss_of(unrolled), (0, 1)))(state, features())
    with jax.set_mesh(make_mesh(seq=2)):
        got = quick(jax.value_and_grad(loss_of(scanned), (0, 1)))(state, features())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) != 0


def kept(policy, window, devices):
    """Bytes that a layer's forward pass hands to its backward pass, on each device."""
    # No rotation: all layers share its angles.
    settings = dict(SIZES, window_size=window, rope=None)
    make = functools.partial(ring_swa_jax.nnx.RingSlidingWindowAttention, **settings)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    if POLICIES[policy] is not None:
        apply = jax.checkpoint(apply, policy=POLICIES[policy])
    mesh = make_mesh(seq=devices)
    sharding = NamedSharding(mesh, P(None, "seq"))
    x = jax.ShapeDtypeStruct((1, 64 * devices, E), jnp.float32, sharding=sharding)
    with jax.set_mesh(mesh):
        program = quick(lambda state, x: jax.vjp(apply, state, x)[1]).lower(state, x).compile()
    return program.memory_analysis().output_size_in_bytes


def test_checkpointing_keeps_less_and_no_halo():
    number, pointers = 4, 2 * 8  # bytes of a float32, and those of the addresses of two arrays
    plain, context, nothing = (kept(policy, 20, 8) for policy in POLICIES)
    assert plain == kept("none", 20, 2)
    assert plain - kept("none", 0, 8) == 20 * (16 + 16) * number + pointers  # the halo
    assert context - nothing == 64 * 2 * (16 + 1) * number + pointers  # output and log-sum-exp
    assert context < plain
