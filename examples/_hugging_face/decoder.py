"""Gemma 3 and gpt-oss as Hugging Face has them, around this library's attention layers.

Only the attention's parameters are turned into another form; all others keep the names and shapes
that they have in a checkpoint.
"""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ring_swa_jax import segment_positions, settings_from_hugging_face
from ring_swa_jax.linen import RingSlidingWindowAttention

Tensors = dict[str, Any]  # arrays of JAX, or of NumPy where they are read and written
Attend = Callable[[jax.Array], jax.Array]


class Parameters(NamedTuple):
    """A decoder's parameters."""

    attention: list[dict[str, Any]]
    """Of each layer, as `RingSlidingWindowAttention` takes them."""
    tensors: Tensors
    """All others, by their names in the checkpoint without the prefix of the text decoder."""

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self.tensors["embed_tokens.weight"].shape[0]


class Decoder(abc.ABC):
    """From tokens to logits: embedding, layers, final norm, and a head that may be tied.

    Args:
        config: config.json of the text decoder.
        dtype: of the computation.
        settings: of the attention layers, such as mesh axes.
    """

    norm_offset = 0.0  # added to the factors of all norms
    tied = False  # the default of transformers
    epsilon = 1e-6  # also a default

    def __init__(self, config: Mapping[str, Any], *, dtype: Any = jnp.float32, **settings: Any):
        self.config, self.dtype = config, dtype
        self.model_layers = settings_from_hugging_face(config)
        self.attention = [
            RingSlidingWindowAttention(**self.model_layers.kinds[kind], dtype=dtype, **settings)
            for kind in self.model_layers.layers
        ]
        self.epsilon = config.get("rms_norm_eps", self.epsilon)
        self.tied = config.get("tie_word_embeddings", self.tied)
        self.features: int = config["hidden_size"]

    def shapes(self, vocabulary: int) -> dict[str, tuple[int, ...]]:
        """The shape of each of `Parameters.tensors`."""
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (vocabulary, self.features),
            "norm.weight": (self.features,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (vocabulary, self.features)
        for i in range(len(self.attention)):
            shapes |= {f"layers.{i}.{name}": s for name, s in self.layer_shapes().items()}
        return shapes

    def __call__(
        self, parameters: Parameters, tokens: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Logits [B, S, vocabulary] of packed documents, each with positions of its own."""
        positions = segment_positions(segment_ids)
        tensors = parameters.tensors
        x = self.embed(tensors["embed_tokens.weight"][tokens].astype(self.dtype))
        # The backward pass computes a layer again, except for its attention's context.
        remat = jax.checkpoint_policies.save_only_these_names("context")
        for i, (module, own) in enumerate(zip(self.attention, parameters.attention, strict=True)):

            def layer(x, own, tensors, module=module):
                def attend(x):
                    ids = {"segment_ids": segment_ids, "positions": positions}
                    return module.apply({"params": own}, x, **ids)

                return self.block(x, attend, tensors)

            prefix = f"layers.{i}."
            of_layer = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            x = jax.checkpoint(layer, policy=remat)(x, own, of_layer)
        x = self.norm(x, tensors["norm.weight"])
        head = tensors["embed_tokens.weight" if self.tied else "lm_head.weight"]
        return self.cap(linear(x, head).astype(jnp.float32))

    @abc.abstractmethod
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a layer's tensors, without the attention's."""

    @abc.abstractmethod
    def block(self, x: jax.Array, attend: Attend, tensors: Tensors) -> jax.Array:
        """One layer: ``attend`` is its attention, ``tensors`` its other tensors."""

    def embed(self, x: jax.Array) -> jax.Array:
        """What the first layer takes, from the embeddings of tokens."""
        return x

    def cap(self, logits: jax.Array) -> jax.Array:
        """The logits, limited where the model does that."""
        cap = self.config.get("final_logit_softcapping")
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def norm(self, x: jax.Array, factor: jax.Array) -> jax.Array:
        """RMSNorm of the features."""
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (wide * (factor + self.norm_offset)).astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """What torch's Linear computes, whose weight is [output, input]."""
    y = jnp.einsum("bsi,oi->bso", x, weight.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)


class Gemma3(Decoder):
    """Gemma 3: a norm before and after each half of a layer, and a gated network."""

    norm_offset = 1.0
    tied = True

    def __init__(self, config: Mapping[str, Any], **settings: Any):
        super().__init__(config, **settings)
        activation = config.get("hidden_activation", "gelu_pytorch_tanh")
        if activation != "gelu_pytorch_tanh":
            raise NotImplementedError(
                f"hidden_activation={activation!r}: only 'gelu_pytorch_tanh' is here"
            )

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        features, hidden = self.features, self.config["intermediate_size"]
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        return {f"{name}_layernorm.weight": (features,) for name in norms} | {
            "mlp.gate_proj.weight": (hidden, features),
            "mlp.up_proj.weight": (hidden, features),
            "mlp.down_proj.weight": (features, hidden),
        }

    def embed(self, x: jax.Array) -> jax.Array:
        return x * jnp.asarray(math.sqrt(self.features), x.dtype)

    def block(self, x: jax.Array, attend: Attend, tensors: Tensors) -> jax.Array:
        y = attend(self.norm(x, tensors["input_layernorm.weight"]))
        x += self.norm(y, tensors["post_attention_layernorm.weight"])
        y = self.norm(x, tensors["pre_feedforward_layernorm.weight"])
        gate = jax.nn.gelu(linear(y, tensors["mlp.gate_proj.weight"]), approximate=True)
        y = linear(gate * linear(y, tensors["mlp.up_proj.weight"]), tensors["mlp.down_proj.weight"])
        return x + self.norm(y, tensors["post_feedforward_layernorm.weight"])


class GptOss(Decoder):
    """gpt-oss: experts, of which a router chooses a few for each token."""

    epsilon = 1e-5

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        features, hidden = self.features, self.config["intermediate_size"]
        experts = self.config["num_local_experts"]
        return {
            "input_layernorm.weight": (features,),
            "post_attention_layernorm.weight": (features,),
            "mlp.router.weight": (experts, features),
            "mlp.router.bias": (experts,),
            "mlp.experts.gate_up_proj": (experts, features, 2 * hidden),
            "mlp.experts.gate_up_proj_bias": (experts, 2 * hidden),
            "mlp.experts.down_proj": (experts, hidden, features),
            "mlp.experts.down_proj_bias": (experts, features),
        }

    def block(self, x: jax.Array, attend: Attend, tensors: Tensors) -> jax.Array:
        x += attend(self.norm(x, tensors["input_layernorm.weight"]))
        return x + self.experts(self.norm(x, tensors["post_attention_layernorm.weight"]), tensors)

    def experts(self, x: jax.Array, tensors: Tensors) -> jax.Array:
        """The chosen experts' outputs, weighted by the softmax of their router's logits.

        Every expert computes every token, and what was not chosen has the weight zero. That is
        simple and right, and costs as many times more as there are experts for each one chosen.
        """
        logits = linear(x, tensors["mlp.router.weight"], tensors["mlp.router.bias"])
        chosen, index = jax.lax.top_k(logits, self.config.get("num_experts_per_tok", 4))
        chosen_weights = jax.nn.softmax(chosen)
        weights = jnp.einsum(
            "bsk,bskx->xbs", chosen_weights, jax.nn.one_hot(index, logits.shape[-1], dtype=x.dtype)
        )
        alpha = self.config.get("swiglu_alpha", 1.702)
        limit = self.config.get("swiglu_limit", 7.0)

        def add_expert(total, expert):
            weight, gate_up_proj, gate_up_bias, down_proj, down_bias = expert
            gate_up = x @ gate_up_proj.astype(x.dtype) + gate_up_bias.astype(x.dtype)
            gate = jnp.minimum(gate_up[..., ::2], limit)
            up = jnp.clip(gate_up[..., 1::2], -limit, limit)
            y = (up + 1) * gate * jax.nn.sigmoid(alpha * gate)
            y = y @ down_proj.astype(x.dtype) + down_bias.astype(x.dtype)
            return total + weight[..., None] * y, None

        names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        of_experts = [tensors[f"mlp.experts.{name}"] for name in names]
        return jax.lax.scan(add_expert, jnp.zeros_like(x), (weights, *of_experts))[0]


DECODERS: Mapping[str, type[Decoder]] = {
    "gemma3": Gemma3,
    "gemma3_text": Gemma3,
    "gpt_oss": GptOss,
}


def create_decoder(config: Mapping[str, Any], **settings: Any) -> Decoder:
    """The decoder of a config.json, or of the ``text_config`` in it.

    Raises:
        NotImplementedError: another model, or a setting that is not here.
        ValueError: a key is missing.
    """
    text = config.get("text_config", config)
    model_type = text.get("model_type", config.get("model_type"))
    if model_type not in DECODERS:
        raise NotImplementedError(
            f"model_type={model_type!r}: there are decoders of {', '.join(DECODERS)}"
        )
    if quantization := config.get("quantization_config"):
        raise NotImplementedError(
            f"quantization_config={quantization!r}: dequantize the checkpoint first"
        )
    missing = {"hidden_size", "intermediate_size", "num_hidden_layers"} - text.keys()
    if DECODERS[model_type] is GptOss:
        missing |= {"num_local_experts"} - text.keys()
    if missing:
        raise ValueError(f"config.json has no {', '.join(sorted(missing))}")
    return DECODERS[model_type](text | {"model_type": model_type}, **settings)
