"""Parameters of an attention module from the tensors of one layer in a checkpoint, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from ring_swa_jax._hugging_face.nested import flatten, unflatten
from ring_swa_jax._hugging_face.places import Tensors, places
from ring_swa_jax._model_layers import ModelLayers

Parameters = dict[str, Any]


def weights_from_hugging_face(
    tensors: Mapping[str, np.ndarray], model_layers: ModelLayers, layer: int
) -> Parameters:
    """Parameters of one attention layer from its tensors in a checkpoint.

    ``kernel[e, n, h] = q_proj.weight[n * H + h, e]``, and likewise for the other projections. Fused
    projections are split, norms stored less one get the one back (Gemma), and a factor of the
    values is multiplied in (MiMo). The arithmetic is done in the dtype of the tensors: make
    Gemma's bfloat16 tensors float32 first, as transformers does before it adds the one.

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
    layer_tensors = Tensors(tensors, _title(model_layers, layer))
    parameters = {}
    for place in places(layer_tensors, model_layers, layer):
        _, tensor = layer_tensors.take(place.names, place.shape)
        array = rearrange(
            tensor[place.rows], f"{place.of_tensor} -> {place.of_parameter}", **place.sizes
        )
        if place.factor != 1:
            array = array * np.asarray(place.factor, array.dtype)
        if place.offset != 0:
            array = array + np.asarray(place.offset, array.dtype)
        parameters[place.path] = array
    layer_tensors.check_all_taken()
    return unflatten(parameters)


def weights_to_hugging_face(
    parameters: Mapping[str, Any],
    model_layers: ModelLayers,
    layer: int,
    *,
    like: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint from the parameters of one attention layer.

    The inverse of `weights_from_hugging_face`, to rounding: training reads a checkpoint with the
    one and writes it back with the other.

    Args:
        parameters: of the layer, arrays of NumPy or JAX: the "params" of the Linen module, or
            ``nnx.to_pure_dict(nnx.state(module, nnx.Param))``.
        model_layers: of `settings_from_hugging_face` or `layer_settings`.
        layer: index of the layer in ``model_layers.layers``.
        like: the tensors that the layer was read from. The result has their names, shapes and
            dtypes.

    Raises:
        ValueError: a parameter of another shape, one too few or too many; or ``like`` does not
            fit, as `weights_from_hugging_face` says of its tensors.
    """
    title = _title(model_layers, layer)
    old, left = Tensors(like, title), flatten(parameters)
    tensors: dict[str, np.ndarray] = {}
    for place in places(old, model_layers, layer):
        name, template = old.take(place.names, place.shape)
        part = template[place.rows]
        expected = rearrange(part, f"{place.of_tensor} -> {place.of_parameter}", **place.sizes)
        found = left.pop(place.path, None)
        if np.shape(found) != expected.shape:
            raise ValueError(
                f"{title}: parameter {'.'.join(place.path)!r} should have the shape "
                f"{expected.shape}, got {None if found is None else np.shape(found)}; all are "
                f"{sorted('.'.join(path) for path in flatten(parameters))}"
            )
        array = np.asarray(found)
        if place.offset != 0:
            array = array - np.asarray(place.offset, array.dtype)
        if place.factor != 1:
            array = array / np.asarray(place.factor, array.dtype)
        tensors.setdefault(name, np.empty_like(template))[place.rows] = rearrange(
            array, f"{place.of_parameter} -> {place.of_tensor}", **place.sizes
        )
    old.check_all_taken()
    if left:
        raise ValueError(f"{title}: no tensor has a place for {['.'.join(path) for path in left]}")
    return tensors


def _title(model_layers: ModelLayers, layer: int) -> str:
    """The layer, as messages name it."""
    kind = model_layers.layers[layer]
    if kind not in model_layers.kinds:
        raise ValueError(f"layer {layer} is {kind!r}, which is no attention")
    return f"layer {layer}, {kind!r}"
