"""What transformers computes for attention layers of a small model. Needs torch."""

import inspect
import json
import re
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.ring_swa_jax.hugging_face.cases import DOCUMENTS, inputs, weights_of
from tests.ring_swa_jax.hugging_face.small_models import Small


class Results(NamedTuple):
    """Of one layer."""

    shapes: dict[str, tuple[int, ...]]  # of its tensors
    out: np.ndarray  # [B, S, E]
    gradient: np.ndarray  # of x


def config_and_results(small: Small) -> tuple[dict[str, Any], dict[int, Results]]:
    """The config.json that transformers writes, and the results of each layer asked for."""
    torch.manual_seed(0)
    config = small.make_config()
    written = json.loads(config.to_json_string(use_diff=True))
    written["model_type"] = written.get("model_type") or small.model_type
    model = small.make_model(config)
    layers = _attention_layers(model)
    for i, layer in layers.items():
        _set_weights(layer, i)
    calls = {length: _captured(model, config, layers, length) for length in set(_lengths())}
    return written, {i: _results(config, layers, calls, i) for i in small.layers}


def _lengths():
    return [length for row in DOCUMENTS for length in row]


def _attention_layers(model) -> dict[int, torch.nn.Module]:
    """By the index of the layer; attention of a decoder to itself."""
    found = {}
    for name, module in model.named_modules():
        match = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(self_attn|attn|temporal_block)", name)
        text = not re.search(r"vision|image|audio|encoder\.", name)
        if match and text and re.search(r"Attention$", type(module).__name__):
            found[int(match[1])] = module
    return found


def _set_weights(layer: torch.nn.Module, index: int) -> None:
    state = layer.state_dict()
    weights = weights_of({name: tuple(t.shape) for name, t in state.items()}, index)
    layer.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})


def _captured(model, config, layers, length: int) -> dict[int, dict[str, Any]]:
    """Keyword arguments with which the model calls each layer for a document of this length."""
    calls: dict[int, dict[str, Any]] = {}

    def hook(index):
        def remember(module, args, kwargs):
            names = list(inspect.signature(module.forward).parameters)
            calls[index] = dict(zip(names, args, strict=False)) | kwargs
            if calls[index].get("cache") is not None:
                calls[index]["cache"] = None  # it would have the keys twice

        return remember

    handles = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in layers.items()
    ]
    ids = torch.arange(length)[None] % 20 + 3
    names = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if "encoder_hidden_states" in names:
        arguments["encoder_hidden_states"] = torch.zeros(1, 3, config.hidden_size)
    if type(model).__name__ == "VoxtralRealtimeTextModel":
        arguments["t_cond"] = torch.zeros(1, config.hidden_size)
    has_embedding = any(isinstance(module, torch.nn.Embedding) for module in model.modules())
    if "input_ids" in names and has_embedding:
        arguments["input_ids"] = ids
    elif "inputs_embeds" in names:
        arguments["inputs_embeds"] = torch.randn(1, length, config.hidden_size)
    else:
        arguments["hidden_states"] = torch.randn(1, length, config.hidden_size)
    with torch.no_grad():
        model(**arguments)
    for handle in handles:
        handle.remove()
    return calls


def _results(config, layers, calls, index: int) -> Results:
    """Output and gradient of x, document by document."""
    x, cotangent = inputs(config.hidden_size)
    outs, gradients = [], []
    for row, lengths in enumerate(DOCUMENTS):
        ends = np.cumsum(lengths)
        for begin, end in zip(ends - lengths, ends, strict=True):
            part = torch.tensor(x[row : row + 1, begin:end], requires_grad=True)
            out = _call(layers, calls[end - begin], part, index)
            out.backward(torch.tensor(cotangent[row : row + 1, begin:end]))
            outs.append(out.detach().numpy())
            gradients.append(part.grad.numpy())
    shape = x.shape
    state = layers[index].state_dict()
    return Results(
        {name: tuple(t.shape) for name, t in state.items()},
        np.concatenate(outs, 1).reshape(shape),
        np.concatenate(gradients, 1).reshape(shape),
    )


def _call(layers, calls, x, index: int) -> torch.Tensor:
    """A layer on x, after those before, whose keys and values it may take."""
    for i in sorted(layers):
        if i < index and "shared_kv_states" in calls[i]:
            layers[i](**{**calls[i], "hidden_states": x})
    out = layers[index](**{**calls[index], "hidden_states": x})
    return out[0] if isinstance(out, tuple) else out
