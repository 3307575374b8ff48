"""The decoder of the whole-model benchmark: embedding, blocks, norm; all else is around it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from benchmarks._model_loss import mean_cross_entropy
from benchmarks._model_sharding import embedded, gathered, tokens_cut
from benchmarks._model_sizes import ModelSize
from ring_swa_jax.nnx import RingSlidingWindowAttention

KEEP = jax.checkpoint_policies.save_only_these_names("context")


class Block(nnx.Module):
    """One layer: attention, then a gated MLP, each between norms and around a residual."""

    def __init__(self, size: ModelSize, settings: dict[str, Any], dtype: str, *, rngs: nnx.Rngs):
        norm = functools.partial(nnx.RMSNorm, size.features, dtype=jnp.dtype(dtype), rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.dtype(dtype), rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = RingSlidingWindowAttention(
            **settings, batch_axis="data", dtype=jnp.dtype(dtype), rngs=rngs
        )
        self.gate = linear(size.features, size.hidden)
        self.up = linear(size.features, size.hidden)
        self.down = linear(size.hidden, size.features)
        self.post_norms = nnx.List([norm(), norm()] if size.post_norms else [])
        self.activation = size.activation

    def __call__(self, x: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
        after_attention, after_mlp = self.post_norms or (lambda y: y, lambda y: y)
        x = x + after_attention(self.attention(self.attention_norm(x)))
        y = self.mlp_norm(x)
        y = self.down(getattr(nnx, self.activation)(self.gate(y)) * self.up(y))
        return tokens_cut(x + after_mlp(y))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Functions of a tree of parameters.

    Blocks whose settings repeat are one `lax.scan`, so that only its body is compiled; what remains
    of a pattern follows.

    Attributes:
        size: of the model.
        dtype: in which it computes; parameters are float32.
    """

    size: ModelSize
    dtype: str = "bfloat16"

    @property
    def repeats(self) -> int:
        """Of the scan's body."""
        return self.size.layers // self.size.body

    def _block(self, layer: int, key: Array) -> Block:
        return Block(self.size, self.size.kinds[layer], self.dtype, rngs=nnx.Rngs(key))

    @functools.cached_property
    def _graphs(self) -> list[Any]:
        """What of each layer of the body is no array."""

        def graph(layer):
            block = nnx.eval_shape(lambda: self._block(layer, jax.random.key(0)))
            return nnx.graphdef(block)

        return [graph(layer) for layer in range(self.size.body)]

    def init(self, key: Array) -> dict[str, Any]:
        """Random parameters."""
        size = self.size
        keys = iter(jax.random.split(key, size.layers + 2))

        def state(layer, key):
            return nnx.state(self._block(layer, key))

        def repeated(layer):
            own = jnp.stack([next(keys) for _ in range(self.repeats)])
            return jax.vmap(functools.partial(state, layer))(own)

        def table():
            shape = (size.vocabulary, size.features)
            return jax.random.normal(next(keys), shape) * size.features**-0.5

        repeated_layers = self.repeats * size.body
        parameters = {
            "embedding": table(),
            "blocks": [repeated(layer) for layer in range(size.body)],
            "rest": [state(n, next(keys)) for n in range(repeated_layers, size.layers)],
            "norm": jnp.ones(size.features),
        }
        return parameters if size.tied else parameters | {"output": table()}

    def features(
        self, parameters: dict[str, Any], tokens: Int[Array, "B S"]
    ) -> Float[Array, "B S E"]:
        """What the output's matrix multiplies."""
        dtype = jnp.dtype(self.dtype)
        x = embedded(parameters["embedding"], tokens, dtype)
        x = x * jnp.asarray(self.size.features**0.5, dtype)
        x, _ = lax.scan(self._repeat(inside_scan=True), x, parameters["blocks"])
        x, _ = self._repeat(inside_scan=False)(x, parameters["rest"])
        square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        normal = x * lax.rsqrt(square + 1e-6) * parameters["norm"][None, None]
        return normal.astype(dtype)

    def _repeat(self, *, inside_scan: bool):
        """Applies the body's first blocks, as many as there are states."""

        def apply(graph, state, x):
            state = jax.tree.map(lambda w: w if w.ndim < 2 else gathered(w, x.dtype), state)
            return nnx.merge(graph, state)(x)

        def repeat(x, states):
            for graph, state in zip(self._graphs, states, strict=False):
                block = functools.partial(apply, graph)
                x = jax.checkpoint(block, policy=KEEP, prevent_cse=not inside_scan)(state, x)
            return x, None

        return repeat

    def loss(
        self, parameters: dict[str, Any], tokens: Int[Array, "B S"], targets: Int[Array, "B S"]
    ) -> Float[Array, ""]:
        """Mean cross entropy."""
        table = parameters["embedding" if self.size.tied else "output"]
        x = self.features(parameters, tokens)
        return mean_cross_entropy(x, table, targets, self.size.vocabulary_chunk)
