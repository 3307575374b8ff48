"""The models of the whole-model benchmark, and the work of a training step."""

import dataclasses
from typing import Any

import numpy as np

from benchmarks._ring_shapes import RingShape
from ring_swa_jax import ModelLayers, layer_settings, settings_from_hugging_face
from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._exchange import choose_exchange
from ring_swa_jax._window import Window

PEAK_FLOPS = 989e12
"""Dense bfloat16 products of an H100 SXM, a second, by its data sheet."""


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """A decoder-only model.

    Attributes:
        name: of the model.
        attention: settings of its attention layers.
        layers: how many of them the benchmark takes.
        features: E, width of the residual stream.
        hidden: width of the gated MLP.
        vocabulary: V, a multiple of ``vocabulary_chunk``.
        tied: whether the embedding is also the output's matrix.
        post_norms: whether the results of attention and MLP are normalised too.
        activation: of the MLP's gate, a function of `flax.nnx`.
        vocabulary_chunk: for so many words at a time the loss computes logits.
    """

    name: str
    attention: ModelLayers
    layers: int
    features: int
    hidden: int
    vocabulary: int
    tied: bool
    post_norms: bool
    activation: str
    vocabulary_chunk: int = 4096

    @property
    def kinds(self) -> tuple[dict[str, Any], ...]:
        """Settings of every layer that is taken."""
        return tuple(self.attention.kinds[kind] for kind in self.attention.layers[: self.layers])

    @property
    def period(self) -> int:
        """After how many layers the settings repeat."""
        kinds = self.attention.layers[: self.layers]
        return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])

    @property
    def body(self) -> int:
        """Layers of a scan's body: four or more, where they divide all layers.

        While one of them computes, the matrices of another can travel.
        """
        layers = self.period * -(-4 // self.period)
        return self.period if self.layers % layers else layers

    def shape(self, layer: int, batch: int, length: int) -> RingShape:
        """The attention call of a layer."""
        kind = self.kinds[layer]
        heads, kv_heads, dim = (kind[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
        learned = kind.get("learned_sinks", False)
        window = kind["window_size"]
        return RingShape(
            self.name, length, heads, kv_heads, dim, window, batch=batch, learned=learned
        )

    def layer_weights(self) -> int:
        """Entries of the matrices of all layers."""
        heads = (2 * (k["num_heads"] + k["num_kv_heads"]) * k["head_dim"] for k in self.kinds)
        return sum(self.features * (columns + 3 * self.hidden) for columns in heads)

    def parameters(self) -> int:
        """Entries of all matrices."""
        return self.layer_weights() + (1 if self.tied else 2) * self.vocabulary * self.features

    def useful_flops(self, batch: int, length: int) -> float:
        """Of a training step, nothing counted twice that a step may compute anew.

        6 for each token and entry of a matrix that multiplies it (the embedding is a table, the
        output's matrix counts); for each layer, attended pair of query and key, and query head,
        12 H: two products forward and four backward.
        """
        weights = self.layer_weights() + self.vocabulary * self.features
        shapes = (self.shape(layer, batch, length) for layer in range(self.layers))
        return 6.0 * weights * batch * length + sum(3 * shape.forward_flops() for shape in shapes)

    def utilisation(self, batch: int, length: int, devices: int, seconds: float) -> float:
        """Model FLOPs utilisation: useful FLOPs over what the devices' data sheets promise."""
        return self.useful_flops(batch, length) / (seconds * devices * PEAK_FLOPS)

    def busiest_flops(self, contender: str, batch: int, length: int, devices: int) -> float:
        """FLOPs of the device with the most of them, recomputation included.

        8 for each of its tokens and entry of a matrix; for each of its pairs and head 14 H, as
        the backward kernels compute the logits once more. ``devices`` cut the sequence.
        """
        weights = self.layer_weights() + self.vocabulary * self.features
        flops = 8.0 * weights * batch * length / devices
        for layer in range(self.layers):
            shape = self.shape(layer, batch, length)
            pairs = busiest_pairs(contender, shape, devices)
            flops += 14.0 * pairs * shape.heads * shape.dim
        return flops


def busiest_pairs(contender: str, shape: RingShape, devices: int) -> float:
    """Pairs of query and key that the busiest device computes, of each query head.

    Exchanges of heads and the balanced ring share the pairs evenly. With chunks of the sequence
    the last device has the most; cuDNN behind an all-gather computes a window's rows in vain.
    """
    chunk, window = shape.chunk(devices), shape.window
    exchange = choose_exchange(
        None,
        SequenceAxis("seq", devices),
        chunk=chunk,
        heads=shape.heads,
        window=Window.of(shape.window_size),
        num_sinks=shape.sinks,
    )
    even = contender == "all-to-all + cuDNN" or (contender == "ours" and exchange != "halo")
    if devices == 1 or even:
        return shape.pairs() / devices
    positions = np.arange(shape.length - chunk, shape.length, dtype=np.int64)
    seen = positions + 1 if window is None else np.minimum(positions, window) + 1
    pairs = int(seen.sum())
    if contender == "all-gather + cuDNN" and window is not None:
        rows = shape.halo(devices)
        pairs += rows * (rows + 1) // 2
    return shape.batch * pairs


def _gemma3_1b() -> ModelLayers:
    return settings_from_hugging_face(
        {
            "model_type": "gemma3_text",
            "hidden_size": 1152,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "num_hidden_layers": 26,
            "sliding_window": 512,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        source="https://huggingface.co/google/gemma-3-1b-pt, config.json; arXiv:2503.19786",
    )


def _small() -> ModelLayers:
    """Of a model for compiling alone: its sizes are divided by 256 devices."""
    local: dict[str, Any] = {
        **{"in_features": 2048, "num_heads": 16, "num_kv_heads": 8, "head_dim": 128},
        **{"use_bias": False, "rope": layer_settings("mistral_7b").kinds["local"]["rope"]},
    }
    kinds = {"local": local | {"window_size": 1023}, "global": local | {"window_size": None}}
    return ModelLayers("none", ("local", "global") * 2, kinds)


_GEMMA: dict[str, Any] = {"tied": True, "post_norms": True, "activation": "gelu"}
_LLAMA: dict[str, Any] = {"tied": False, "post_norms": False, "activation": "silu"}
MODELS = {
    size.name: size
    for size in (
        ModelSize("gemma3-1b", _gemma3_1b(), 26, 1152, 6912, 262144, **_GEMMA),
        # A token's four experts of 2880 are one MLP here.
        ModelSize("gpt-oss", layer_settings("gpt_oss_20b"), 12, 2880, 11520, 204800, **_LLAMA),
        ModelSize("gemma3-4b", layer_settings("gemma3_4b"), 12, 2560, 10240, 262144, **_GEMMA),
        ModelSize("mistral-7b", layer_settings("mistral_7b"), 8, 4096, 14336, 32768, **_LLAMA),
    )
}
SMALL = ModelSize("small", _small(), 4, 2048, 8192, 32768, **_LLAMA)


def short(size: ModelSize) -> ModelSize:
    """The model with three layers of each kind in turns: a scan of three steps."""
    kinds = 3 * tuple(size.attention.kinds)
    attention = dataclasses.replace(size.attention, layers=kinds, kv_from=())
    return dataclasses.replace(size, attention=attention, layers=len(kinds))


def tiny(size: ModelSize) -> ModelSize:
    """A model of the same kinds of layers for a CPU: three of each, few and small heads."""
    size = short(size)
    kinds = {
        name: kind
        | {"in_features": 32, "num_heads": 4, "head_dim": 8}
        | {"num_kv_heads": min(kind["num_kv_heads"], 2)}
        | ({} if kind["window_size"] is None else {"window_size": 9})
        for name, kind in size.attention.kinds.items()
    }
    attention = dataclasses.replace(size.attention, kinds=kinds)
    return dataclasses.replace(
        size, attention=attention, features=32, hidden=48, vocabulary=128, vocabulary_chunk=32
    )
