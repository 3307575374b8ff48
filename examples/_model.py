"""The byte-level Transformers of `train_lm.py`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ring_swa_jax import Rope, segment_positions
from ring_swa_jax.nnx import RingSlidingWindowAttention

VOCABULARY = 256
FEATURES = 96

Settings = dict[str, Any]
# How to ask for attention: (module, features, cache) to (features, cache). The rest of a model is
# the same in training, where there are no caches, in reading a prompt, and in going on with it.
Attend = Callable[[RingSlidingWindowAttention, jax.Array, Any], tuple[jax.Array, Any]]


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

    Nothing here speaks of devices, except that the attention finds the mesh axis "seq", over which
    the sequence is cut, in the mesh of `jax.set_mesh`.
    """

    def __init__(self, settings: Settings, *, rngs: nnx.Rngs):
        sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
        common: Settings = {**sizes, "use_bias": False, "rope": Rope()}
        hidden = 2 * FEATURES
        self.attention_norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.attention = RingSlidingWindowAttention(
            in_features=FEATURES, **(common | settings), rngs=rngs
        )
        self.feed_forward_norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.gate = nnx.Linear(FEATURES, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(FEATURES, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, FEATURES, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, cache: Any, attend: Attend) -> tuple[jax.Array, Any]:
        context, cache = attend(self.attention, self.attention_norm(x), cache)
        x = x + context
        y = self.feed_forward_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y)), cache


# The repeats of a pattern are one list of Blocks whose parameters, and caches, have a leading axis:
# so one repeat is compiled, not all of them.
@nnx.vmap(in_axes=(None, 0))
def _create_blocks(pattern: tuple[Settings, ...], rngs: nnx.Rngs) -> nnx.List[Block]:
    return nnx.List(Block(settings, rngs=rngs) for settings in pattern)


class ByteTransformer(nnx.Module):
    """Predicts the next byte of every document in a pack."""

    def __init__(self, pattern: tuple[Settings, ...], repeats: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.blocks = _create_blocks(pattern, rngs.fork(split=repeats))
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        # Positions count from the start of each document, wherever in the pack it lies.
        positions = segment_positions(segment_ids)

        def attend(module, x, cache):
            return module(x, segment_ids=segment_ids, positions=positions), cache

        return self.apply(tokens, [None] * len(self.blocks), attend)[0]

    def prefill(self, tokens: jax.Array, max_length: int) -> tuple[jax.Array, Any]:
        """Logits of whole documents [B, S], and the caches to `decode` what follows."""

        def attend(module, x, cache):
            return module.prefill(x, max_length=max_length)

        return self.apply(tokens, [None] * len(self.blocks), attend)

    def decode(self, tokens: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        """Logits of the documents' next tokens [B, T], and the caches after these."""
        return self.apply(tokens, caches, RingSlidingWindowAttention.decode)

    def apply(self, tokens: jax.Array, caches: Any, attend: Attend) -> tuple[jax.Array, Any]:
        """Logits, and the caches of all blocks, by one way to ask for attention."""

        @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def repeat(blocks, x, caches):
            after = []
            for block, cache in zip(blocks, caches, strict=True):
                x, cache = block(x, cache, attend)
                after.append(cache)
            return x, after

        x, caches = repeat(self.blocks, self.embedding(tokens), caches)
        return self.head(self.norm(x)), caches


def loss_fn(
    model: ByteTransformer, tokens: jax.Array, targets: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Mean cross entropy in nats per byte, over the bytes that have a target."""
    logits = model(tokens, segment_ids)
    has_target = targets >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.sum(losses, where=has_target) / jnp.maximum(has_target.sum(), 1)


@nnx.jit(static_argnames="length")
def sample(
    model: ByteTransformer, prompt: jax.Array, length: int, temperature: float, key: jax.Array
) -> jax.Array:
    """Samples the `length` tokens that follow `prompt` [S], the beginning of a document."""
    logits, caches = model.prefill(prompt[None], prompt.size + length)

    @nnx.scan(in_axes=(None, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def step(model, carry, key):
        logits, caches = carry
        token = jax.random.categorical(key, logits / temperature)
        return model.decode(token, caches), token[0, 0]

    return step(model, (logits[:, -1:], caches), jax.random.split(key, length))[1]
