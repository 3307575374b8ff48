"""The byte-level Transformer of `train_lm.py`: sliding-window layers with sink tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import ring_swa_jax

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model."""

    window_size: int
    num_sink_tokens: int
    num_layers: int = 3
    features: int = 96
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 32
    implementation: str | None = None


class Attention(nnx.Module):
    """Grouped-query attention to a sliding window of the same document, over all devices.

    Nothing here speaks of devices, except that `ring_attention` finds the mesh axis "seq", over
    which the sequence is cut, in the mesh of `jax.set_mesh`. It moves only the keys and values
    that a neighbour's window reaches.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = nnx.Linear(config.features, query, use_bias=False, rngs=rngs)
        self.key = nnx.Linear(config.features, key, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(config.features, key, use_bias=False, rngs=rngs)
        self.output = nnx.Linear(query, config.features, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q = ring_swa_jax.apply_rope(self.query(x).reshape(heads), positions)
        k = ring_swa_jax.apply_rope(self.key(x).reshape(heads), positions)
        v = self.value(x).reshape(heads)
        context = ring_swa_jax.ring_attention(
            q,
            k,
            v,
            window_size=self.config.window_size,
            num_sink_tokens=self.config.num_sink_tokens,
            segment_ids=segment_ids,
            seq_axis="seq",
            implementation=self.config.implementation,
        )
        return self.output(context.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        hidden = 2 * config.features
        self.gate = nnx.Linear(config.features, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(config.features, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, config.features, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One layer: attention, then the feed-forward network, each around a residual."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), segment_ids, positions)
        return x + self.feed_forward(self.feed_forward_norm(x))


# All layers are one Block whose parameters have a leading axis, so that one is compiled, not many.
@nnx.vmap(in_axes=(None, 0))
def _create_blocks(config: Config, rngs: nnx.Rngs) -> Block:
    return Block(config, rngs=rngs)


@nnx.scan(in_axes=(0, nnx.Carry, None, None), out_axes=nnx.Carry)
def _apply_blocks(
    block: Block, x: jax.Array, segment_ids: jax.Array, positions: jax.Array
) -> jax.Array:
    return block(x, segment_ids, positions)


class ByteTransformer(nnx.Module):
    """Predicts the next byte of every document in a pack."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, config.features, rngs=rngs)
        self.blocks = _create_blocks(config, rngs.fork(split=config.num_layers))
        self.norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.head = nnx.Linear(config.features, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        # Positions count from the start of each document, wherever in the pack it lies.
        positions = ring_swa_jax.segment_positions(segment_ids)
        x = self.embedding(tokens)
        x = _apply_blocks(self.blocks, x, segment_ids, positions)
        return self.head(self.norm(x))


def loss_fn(
    model: ByteTransformer, tokens: jax.Array, targets: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Mean cross entropy in nats per byte, over the bytes that have a target."""
    logits = model(tokens, segment_ids)
    has_target = targets >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.sum(losses, where=has_target) / jnp.maximum(has_target.sum(), 1)


@nnx.jit
def sample_next(
    model: ByteTransformer,
    tokens: jax.Array,
    position: int | jax.Array,
    temperature: float | jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Samples `tokens[position]` of the one document `tokens` [S]; what follows is not looked at.

    Computes all logits anew for every byte: simple, and quick enough for a few hundred bytes.
    """
    logits = model(tokens[None], jnp.zeros((1, tokens.size), jnp.int32))[0, position - 1]
    token = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
    return tokens.at[position].set(token)
