"""The Transformers of `train_lm.py`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ring_swa_jax import Rope, segment_positions
from ring_swa_jax.nnx import RingSlidingWindowAttention

Settings = dict[str, Any]
# How to ask for attention: (module, features, cache) to (features, cache). The rest of a model is
# the same in training, where there are no caches, in reading a prompt, and in going on with it.
Attend = Callable[[RingSlidingWindowAttention, jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of a model's arrays, and how it computes."""

    vocabulary: int
    features: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"
    """In which it computes; parameters and logits are float32."""
    remat: bool = False
    """Whether the backward pass computes anew what lies between the layers' attention."""

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU networks."""
        return 2 * self.features


def patterns(window_size: int) -> dict[str, tuple[Settings, ...]]:
    """By the name of a model, settings of the layers that repeat."""
    near, far = {"window_size": window_size}, {"window_size": None}
    gpt_oss = {"learned_sinks": True, "use_bias": True, "rope": Rope(150_000.0)}
    gemma_near = {"qk_norm": True, **near}
    gemma_far = {"qk_norm": True, **far, "rope": Rope(1_000_000.0)}
    return {
        "sliding-window": ({"num_sink_tokens": 4, **near},),
        "gpt-oss-like": ({**gpt_oss, **near}, {**gpt_oss, **far}),
        "gemma-like": (*5 * [gemma_near], gemma_far),
    }


class Block(nnx.Module):
    """One layer: attention, then a SwiGLU network, each around a residual.

    Nothing here speaks of devices, except that the attention finds the axes "data" and "seq", over
    which batch and sequence are cut, in the mesh of `jax.set_mesh`.
    """

    def __init__(self, size: Size, settings: Settings, *, rngs: nnx.Rngs):
        common: Settings = {"use_bias": False, "rope": Rope(), "batch_axis": "data"}
        heads = {"num_heads": size.num_heads, "num_kv_heads": size.num_kv_heads}
        dtype = jnp.dtype(size.dtype)
        self.attention_norm = nnx.RMSNorm(size.features, dtype=dtype, rngs=rngs)
        self.attention = RingSlidingWindowAttention(
            in_features=size.features,
            head_dim=size.head_dim,
            dtype=dtype,
            **(common | heads | settings),
            rngs=rngs,
        )
        self.feed_forward_norm = nnx.RMSNorm(size.features, dtype=dtype, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate = linear(size.features, size.hidden)
        self.up = linear(size.features, size.hidden)
        self.down = linear(size.hidden, size.features)

    def __call__(self, x: jax.Array, cache: Any, attend: Attend) -> tuple[jax.Array, Any]:
        context, cache = attend(self.attention, self.attention_norm(x), cache)
        x = x + context
        y = self.feed_forward_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y)), cache


# The repeats of a pattern are one list of Blocks whose parameters, and caches, have a leading axis:
# so one repeat is compiled, not all of them.
@nnx.vmap(in_axes=(None, None, 0))
def _create_blocks(size: Size, pattern: tuple[Settings, ...], rngs: nnx.Rngs) -> nnx.List[Block]:
    return nnx.List(Block(size, settings, rngs=rngs) for settings in pattern)


class Transformer(nnx.Module):
    """Predicts the next token of every document in a pack."""

    def __init__(self, size: Size, pattern: tuple[Settings, ...], repeats: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(size.dtype)
        self.dtype, self.remat = dtype, size.remat
        # In float32: the gradient of a frequent token is a sum over its thousands of places.
        self.embedding = nnx.Embed(size.vocabulary, size.features, rngs=rngs)
        self.blocks = _create_blocks(size, pattern, rngs.fork(split=repeats))
        self.norm = nnx.RMSNorm(size.features, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(
            size.features, size.vocabulary, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        # Positions count from the start of each document, wherever in the pack it lies.
        positions = segment_positions(segment_ids)

        def attend(module, x, cache):
            return module(x, segment_ids=segment_ids, positions=positions), cache

        return self.apply(tokens, [None] * len(self.blocks), attend, remat=self.remat)[0]

    def prefill(self, tokens: jax.Array, max_length: int) -> tuple[jax.Array, Any]:
        """Logits of whole documents [B, S], and the caches to `decode` what follows."""

        def attend(module, x, cache):
            return module.prefill(x, max_length=max_length)

        return self.apply(tokens, [None] * len(self.blocks), attend)

    def decode(self, tokens: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        """Logits of the documents' next tokens [B, T], and the caches after these."""
        return self.apply(tokens, caches, RingSlidingWindowAttention.decode)

    def apply(
        self, tokens: jax.Array, caches: Any, attend: Attend, *, remat: bool = False
    ) -> tuple[jax.Array, Any]:
        """Logits, and the caches of all blocks, by one way to ask for attention."""

        def call(block, x, cache):
            return block(x, cache, attend)

        if remat:
            # Attention's results are kept: its kernels run once in the forward pass.
            keep = jax.checkpoint_policies.save_only_these_names("context")
            call = nnx.remat(call, policy=keep)

        @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def repeat(blocks, x, caches):
            after = []
            for block, cache in zip(blocks, caches, strict=True):
                x, cache = call(block, x, cache)
                after.append(cache)
            return x, after

        x = self.embedding(tokens).astype(self.dtype)
        x, caches = repeat(self.blocks, x, caches)
        return self.head(self.norm(x)).astype(jnp.float32), caches


def loss_fn(
    model: Transformer, tokens: jax.Array, targets: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Mean cross entropy in nats per token, over the tokens that have a target."""
    logits = model(tokens, segment_ids)
    has_target = targets >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.sum(losses, where=has_target) / jnp.maximum(has_target.sum(), 1)


@nnx.jit(static_argnames="length")
def sample(
    model: Transformer, prompt: jax.Array, length: int, temperature: float, key: jax.Array
) -> jax.Array:
    """Samples the `length` tokens that follow `prompt` [S], the beginning of a document."""
    logits, caches = model.prefill(prompt[None], prompt.size + length)

    @nnx.scan(in_axes=(None, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def step(model, carry, key):
        logits, caches = carry
        token = jax.random.categorical(key, logits / temperature)
        return model.decode(token, caches), token[0, 0]

    return step(model, (logits[:, -1:], caches), jax.random.split(key, length))[1]
