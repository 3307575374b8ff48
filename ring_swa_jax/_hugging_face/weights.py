"""Parameters of an attention module from the tensors of one layer in a checkpoint."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from ring_swa_jax._model_layers import ModelLayers

Parameters = dict[str, Any]
# Names that different checkpoints give to the same tensor.
_NAMES = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "fused": ("qkv_proj", "Wqkv"),
    "out": ("o_proj", "Wo", "out_proj"),
    "gate": ("gate_proj", "g_proj"),
    "query_norm": ("q_norm", "q_layernorm", "query_layernorm"),
    "key_norm": ("k_norm", "k_layernorm", "key_layernorm"),
}
_SINKS = ("sinks", "attention_sink_bias")


def weights_from_hugging_face(
    tensors: Mapping[str, np.ndarray], model_layers: ModelLayers, layer: int
) -> Parameters:
    """Parameters of one attention layer from its tensors in a checkpoint.

    ``kernel[e, n, h] = q_proj.weight[n * H + h, e]``, and likewise for the other projections. Fused
    projections are split, norms stored less one get the one back (Gemma), and a factor of the
    values is multiplied in (MiMo).

    Args:
        tensors: arrays by their names in the file without the layer's prefix, such as
            ``"q_proj.weight"`` for ``"model.layers.3.self_attn.q_proj.weight"``; safetensors'
            ``safetensors.numpy.load_file`` returns such a mapping. Pass no other layer's tensors.
        model_layers: of `settings_from_hugging_face` or `layer_settings`.
        layer: index of the layer in ``model_layers.layers``.

    Returns:
        ``{"query": {"kernel": ...}, ..., "sink_logits": ...}``, in NumPy and the dtype of the
        tensors: the "params" of the Linen module, and what ``nnx.update(module, ...)`` takes.

    Raises:
        ValueError: a tensor of another shape, one too few or too many, or a layer that is no
            attention.
    """
    kind = model_layers.layers[layer]
    if kind not in model_layers.kinds:
        raise ValueError(f"layer {layer} is {kind!r}, which is no attention")
    settings = model_layers.kinds[kind]
    layer_tensors = _Tensors(tensors, f"layer {layer}, {kind!r}")
    parameters = _projections(layer_tensors, settings)
    checkpoint = model_layers.checkpoint
    if checkpoint.value_factor != 1:
        for name, array in parameters["value"].items():
            parameters["value"][name] = array * np.asarray(checkpoint.value_factor, array.dtype)
    parameters |= _norms(layer_tensors, settings, checkpoint.norm_offset)
    if settings.get("learned_sinks"):
        parameters["sink_logits"] = layer_tensors.take(_SINKS, (settings["num_heads"],))
    layer_tensors.check_all_taken()
    return parameters


class _Tensors:
    """The tensors of a layer; records which were taken and checks their shapes."""

    def __init__(self, tensors: Mapping[str, np.ndarray], where: str):
        self._tensors, self._where = tensors, where
        self._taken: set[str] = set()

    def has(self, names: tuple[str, ...]) -> bool:
        """Whether one of the names is there."""
        return any(name in self._tensors for name in names)

    def take(self, names: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The tensor under one of the names, with its shape checked."""
        name = next((name for name in names if name in self._tensors), None)
        if name is None:
            raise ValueError(
                f"{self._where}: none of {names} is there, which should have the shape {shape}; "
                f"there are {sorted(self._tensors)}"
            )
        tensor = np.asarray(self._tensors[name])
        if tensor.shape != shape:
            raise ValueError(
                f"{self._where}: {name!r} should have the shape {shape}, got {tensor.shape}"
            )
        self._taken.add(name)
        return tensor

    def check_all_taken(self) -> None:
        """Checks that all tensors were taken: the settings have no parameter for the rest."""
        left = {
            name: np.shape(tensor)
            for name, tensor in self._tensors.items()
            if name not in self._taken
        }
        if left:
            raise ValueError(f"{self._where}: the settings have no place for {left}")


def _named(part: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in _NAMES[part])


def _projections(tensors: _Tensors, settings: Mapping[str, Any]) -> Parameters:
    features, num_heads = settings["in_features"], settings["num_heads"]
    num_kv_heads, head_dim = settings["num_kv_heads"], settings["head_dim"]
    value_dim = settings.get("value_dim", head_dim)
    use_bias = settings["use_bias"]
    heads = {"query": (num_heads, head_dim)}
    if not settings.get("kv_shared"):
        heads["key"] = (num_kv_heads, head_dim)
        if not settings.get("key_as_value"):
            heads["value"] = (num_kv_heads, value_dim)
    parameters: Parameters = {}
    if tensors.has(_named("fused", "weight")):
        parameters |= _fused(tensors, heads, features, use_bias)
    else:
        for name, (n, h) in heads.items():
            parameters[name] = _projection(tensors, name, n, h, features, use_bias)
    gate = settings.get("output_gate")
    if gate is not None:
        gate_dim = 1 if gate == "headwise" else value_dim
        parameters["gate"] = _projection(tensors, "gate", num_heads, gate_dim, features, False)
    out = tensors.take(_named("out", "weight"), (features, num_heads * value_dim))
    parameters["out"] = {"kernel": rearrange(out, "e (n h) -> n h e", n=num_heads)}
    if settings.get("use_out_bias", use_bias):
        parameters["out"]["bias"] = tensors.take(_named("out", "bias"), (features,))
    return parameters


def _projection(
    tensors: _Tensors, name: str, n: int, h: int, features: int, use_bias: bool
) -> dict[str, np.ndarray]:
    weight = tensors.take(_named(name, "weight"), (n * h, features))
    parameters = {"kernel": rearrange(weight, "(n h) e -> e n h", n=n)}
    if use_bias:
        bias = tensors.take(_named(name, "bias"), (n * h,))
        parameters["bias"] = rearrange(bias, "(n h) -> n h", n=n)
    return parameters


def _fused(
    tensors: _Tensors, heads: Mapping[str, tuple[int, int]], features: int, use_bias: bool
) -> Parameters:
    """Splits a tensor that stacks the rows of queries, keys and values."""
    rows = [math.prod(shape) for shape in heads.values()]
    ends = np.cumsum(rows)[:-1]
    weights = np.split(tensors.take(_named("fused", "weight"), (sum(rows), features)), ends)
    parameters: Parameters = {
        name: {"kernel": rearrange(weight, "(n h) e -> e n h", n=n)}
        for (name, (n, _)), weight in zip(heads.items(), weights, strict=True)
    }
    if use_bias:
        biases = np.split(tensors.take(_named("fused", "bias"), (sum(rows),)), ends)
        for (name, (n, _)), bias in zip(heads.items(), biases, strict=True):
            parameters[name]["bias"] = rearrange(bias, "(n h) -> n h", n=n)
    return parameters


def _norms(tensors: _Tensors, settings: Mapping[str, Any], offset: float) -> Parameters:
    """Factors of the norms of q and k, which span one head or all heads."""
    if not settings.get("qk_norm") or not settings.get("qk_norm_scale", True):
        return {}
    heads = {"query_norm": settings["num_heads"], "key_norm": settings["num_kv_heads"]}
    if settings.get("kv_shared"):
        del heads["key_norm"]
    head_dim = settings["head_dim"]
    parameters: Parameters = {}
    for name, n in heads.items():
        if settings["qk_norm"] == "all_heads":
            factor = tensors.take(_named(name, "weight"), (n * head_dim,)).reshape(n, head_dim)
        else:
            factor = tensors.take(_named(name, "weight"), (head_dim,))
        parameters[name] = factor + np.asarray(offset, factor.dtype)
    return parameters
