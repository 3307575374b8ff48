"""From a model's config.json to the settings of its attention layers."""

from collections.abc import Mapping
from typing import Any

from ring_swa_jax._hugging_face import layer_types as types
from ring_swa_jax._hugging_face.families import families
from ring_swa_jax._hugging_face.family import Bias, Family
from ring_swa_jax._hugging_face.reader import Reader
from ring_swa_jax._hugging_face.refused import refused
from ring_swa_jax._hugging_face.rope import rope_of, rope_parameters
from ring_swa_jax._model_layers import Checkpoint, ModelLayers
from ring_swa_jax._rope import Rope

_NAMES = {
    types.SLIDING: "local",
    "attention": "local",  # RecurrentGemma's
    types.FULL: "global",
    types.CHUNKED: "chunked",
}
_OVERRIDES = {
    "head_dim": "head_dim",
    "num_key_value_heads": "num_kv_heads",
    "num_attention_heads": "num_heads",
}


def settings_from_hugging_face(
    config: Mapping[str, Any], *, max_length: int | None = None, source: str | None = None
) -> ModelLayers:
    """Attention settings of a model from its config.json.

    ``config`` is the file of transformers 4 or 5, ``json.load(open("config.json"))``. Where the
    model has more than text, its ``text_config`` is read. Keys that the file leaves out have the
    defaults of transformers' class. ``sliding_window = n`` becomes
    ``window_size = n - 1``, which means **n keys**.

    Args:
        config: the mapping.
        max_length: the longest sequence that the layers will see. It chooses between the short and
            the long factors of LongRoPE (Phi-3 128k, Phi-3.5, Phi-4-mini), once for all calls; by
            default the model's ``max_position_embeddings``. (transformers chooses anew for each
            call, by the greatest position in it.)
        source: where the config comes from, as the result's ``source`` will say.

    Returns:
        The kinds of layers, the kind of each layer, and how to read a checkpoint's weights.

    Raises:
        NotImplementedError: a key concerns the attention and is unknown, or its value is not
            supported; the model type is unknown, and so is one of its keys.
        ValueError: a required key is missing.
        TypeError: ``config`` is no mapping.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config must be a mapping such as json.load gives, got {type(config)}; of a config of "
            "transformers pass config.to_dict()"
        )
    config = _of_text(config)
    model_type = config.get("model_type", "")
    known = families.get(model_type) or families.get(model_type.removesuffix("_text"))
    family = known or Family()
    reader = Reader(config, family.defaults, family.aliases)
    reader.ignore(*family.ignored)
    layer_types, kv_from, settings = _layers(reader, family, max_length)
    checkpoint = Checkpoint(family.norm_offset, float(reader.get("attention_value_scale", 1.0)))
    for key, causal in (
        ("use_bidirectional_attention", (None, False, "vision")),
        ("is_causal", (None, True)),
    ):
        if reader.get(key) not in causal:
            raise reader.refuse(
                key,
                "windows to both sides are not read from a config; write the layers' settings by "
                "hand, with window_size=(L, R)",
            )
    if any(settings):  # else there was nothing to decide
        reader.refuse_unread(known_type=known is not None)
    names = _names(layer_types, settings)
    return ModelLayers(
        source=source or f"config.json of model_type={model_type!r}",
        layers=tuple(names),
        kinds={n: s for n, s in zip(names, settings, strict=True) if s is not None},
        notes=_notes(family, model_type, known is not None),
        kv_from=kv_from,
        checkpoint=checkpoint,
    )


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text decoder, with the outer model type where it has none of its own.

    Raises:
        NotImplementedError: the model type is not supported.
    """
    while True:
        model_type = config.get("model_type", "")
        if model_type in refused:
            raise NotImplementedError(
                f"model_type={model_type!r} is not read, as its attention needs "
                f"{refused[model_type]}"
            )
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            return config
        config = {"model_type": model_type} | dict(inner)


def _notes(family: Family, model_type: str, known: bool) -> str:
    if known:
        return family.notes
    return (
        f"model_type={model_type!r} is not known: taken as Llama's layers, as all its keys are "
        "known. Compare one layer with the model's own code."
    )


def _layers(reader: Reader, family: Family, max_length: int | None):
    """Each layer's type, the layer whose keys and values it uses or None, its settings or None."""
    num_layers = reader.need("num_hidden_layers")
    given = reader.get("layer_types")
    if given is None:
        given = family.layer_types(reader, num_layers)
    else:
        reader.ignore(*types.INSTEAD_OF_LAYER_TYPES)
    if len(given) != num_layers:
        raise ValueError(
            f"layer_types has {len(given)} entries, but num_hidden_layers={num_layers}"
        )
    attends = [layer_type in _NAMES for layer_type in given]
    kv_from = _kv_from(reader, given)
    settings = [
        _settings(reader, family, i, given[i], kv_from[i], max_length) if attends[i] else None
        for i in range(num_layers)
    ]
    return given, kv_from, settings


def _kv_from(reader: Reader, layer_types: list[str]) -> tuple[int | None, ...]:
    """For each layer the earlier layer whose keys and values it uses; None: its own.

    Each of the last ``num_kv_shared_layers`` uses those of the last layer of its type before these
    layers.
    """
    num_layers = len(layer_types)
    first = num_layers - reader.get("num_kv_shared_layers", 0)

    def source(i: int) -> int | None:
        if i < first:
            return None
        before = [j for j in range(first) if layer_types[j] == layer_types[i]]
        if not before:
            raise reader.refuse(
                "num_kv_shared_layers", f"no layer before has keys for {layer_types[i]!r}"
            )
        return before[-1]

    return tuple(source(i) for i in range(num_layers))


def _settings(
    reader: Reader,
    family: Family,
    index: int,
    layer_type: str,
    kv_from: int | None,
    max_length: int | None,
) -> dict[str, Any]:
    """Keyword arguments of one layer's module."""
    num_heads = reader.need("num_attention_heads")
    in_features = reader.need("hidden_size")
    settings = {
        "in_features": in_features,
        "num_heads": num_heads,
        "num_kv_heads": reader.get("num_key_value_heads") or num_heads,
        "head_dim": reader.get("head_dim") or in_features // num_heads,
        **_bias(reader, family),
        **_scale(reader),
        **_mask(reader, family, layer_type),
    }
    settings |= family.extras(reader, index, layer_type)
    settings |= _overrides(reader, index)
    settings |= _norm(reader, family, settings)
    settings["rope"] = _rope(reader, family, index, layer_type, settings["head_dim"], max_length)
    if settings.get("value_dim") == settings["head_dim"]:
        del settings["value_dim"]
    if kv_from is not None:
        settings["kv_shared"] = True
    return settings


def _bias(reader: Reader, family: Family) -> dict[str, bool]:
    def value(bias: Bias) -> bool:
        return bool(reader.get(bias, False)) if isinstance(bias, str) else bias

    bias, out_bias = value(family.bias), value(family.out_bias)
    return {"use_bias": bias} | ({} if out_bias == bias else {"use_out_bias": out_bias})


def _scale(reader: Reader) -> dict[str, float]:
    settings = {}
    if (cap := reader.get("attn_logit_softcapping")) is not None:
        settings["logits_soft_cap"] = float(cap)
    if (scalar := reader.get("query_pre_attn_scalar")) is not None:
        settings["scale"] = scalar**-0.5
    if (factor := reader.get("attention_multiplier")) is not None:
        settings["scale"] = float(factor)
    return settings


def _norm(reader: Reader, family: Family, settings: Mapping[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"qk_norm": family.qk_norm} if family.qk_norm else {}
    if {"qk_norm", "value_norm", "context_norm"} & (settings.keys() | own.keys()):
        own["qk_norm_epsilon"] = float(reader.get("rms_norm_eps", 1e-6))
    else:
        reader.ignore("rms_norm_eps")  # here it belongs to other norms
    return own


def _mask(reader: Reader, family: Family, layer_type: str) -> dict[str, Any]:
    slides = layer_type in (types.SLIDING, "attention")
    window = family.window(reader)
    if family.full_slides and window is not None:
        slides = True
    if slides and window is None:
        raise reader.refuse("sliding_window", f"layer_types has {layer_type!r}")
    settings: dict[str, Any] = {"window_size": window - 1 if slides and window else None}
    chunk = reader.get("attention_chunk_size")
    if layer_type == types.CHUNKED:
        settings["attention_chunk_size"] = chunk
    return settings


def _overrides(reader: Reader, index: int) -> dict[str, Any]:
    """The layer's settings in ``per_layer_config``, whose keys are layer indices."""
    layers = reader.get("per_layer_config", {})
    own: Mapping[str, Any] = next((o for key, o in layers.items() if int(key) == index), {})
    unknown = {key: value for key, value in own.items() if key not in _OVERRIDES}
    if unknown:
        raise reader.refuse("per_layer_config", f"not understood: {unknown}")
    return {_OVERRIDES[key]: value for key, value in own.items()}


def _rope(
    reader: Reader,
    family: Family,
    index: int,
    layer_type: str,
    head_dim: int,
    max_length: int | None,
) -> Rope | None:
    """Rotary settings of one layer, None where it does not rotate."""
    parameters = rope_parameters(reader, layer_type, family.local_theta)
    if (thetas := reader.get("layer_rope_theta")) and parameters is not None:
        parameters = {**parameters, "rope_theta": thetas[index]}
    if parameters is None or not family.rotates(reader, index, layer_type):
        return None
    return rope_of(
        reader, parameters, head_dim, max_length=max_length, interleaved=family.interleaved
    )


def _names(layer_types: list[str], settings: list[dict[str, Any] | None]) -> list[str]:
    """A name for each kind of settings: its layer type, with a number from the second kind on."""
    names: list[str] = []
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer_type, own in zip(layer_types, settings, strict=True):
        if own is None:
            names.append(layer_type)
            continue
        name = _NAMES[layer_type] + ("_kv_shared" if own.get("kv_shared") else "")
        of_type = kinds.setdefault(name, [])
        if own not in of_type:
            of_type.append(own)
        number = of_type.index(own)
        names.append(name if number == 0 else f"{name}_{number + 1}")
    return names
