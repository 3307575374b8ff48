"""Layer settings that only some model types have, from the keys of their configs."""

from typing import Any

from ring_swa_jax._hugging_face import layer_types as types
from ring_swa_jax._hugging_face.family import Extras
from ring_swa_jax._hugging_face.reader import Reader
from ring_swa_jax._hugging_face.rope import rope_parameters
from ring_swa_jax._query_scaling import QueryScaling


def sinks(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    """One learned sink for each head, in every layer."""
    return {"learned_sinks": True}


def mimo(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    """Sliding layers have learned sinks and another number of key heads."""
    slides = layer_type == types.SLIDING
    kv_heads = reader.need("num_key_value_heads")
    own = reader.get("swa_num_key_value_heads", 2 * kv_heads)
    alike = {
        "swa_num_attention_heads": "num_attention_heads",
        "swa_head_dim": "head_dim",
        "swa_v_head_dim": "v_head_dim",
    }
    for swa, key in alike.items():
        if reader.get(swa) not in (None, reader.get(key)):
            raise reader.refuse(swa, f"layers must have the {key}={reader.get(key)!r} of the rest")
    for key, expected in (
        ("add_swa_attention_sink_bias", True),
        ("add_full_attention_sink_bias", False),
    ):
        if reader.get(key, expected) != expected:
            raise reader.refuse(key, f"only {expected} is known")
    return {
        "num_kv_heads": own if slides else kv_heads,
        "value_dim": reader.need("v_head_dim"),
    } | ({"learned_sinks": True} if slides else {})


def gate(activation: str) -> Extras:
    """A gate for each head where ``gating`` is true or "per-head", else for each feature."""

    def extras(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
        per_head = reader.get("gating", True) in (True, "per-head")
        settings: dict[str, Any] = {"output_gate": "headwise" if per_head else "elementwise"}
        if activation != "sigmoid":
            settings["output_gate_activation"] = activation
        heads = reader.get("num_attention_heads_per_layer")
        if heads is not None:
            settings["num_heads"] = heads[index]
        sliding_heads = reader.get("num_sliding_attention_heads")
        if layer_type == types.SLIDING and sliding_heads is not None:
            settings["num_heads"] = sliding_heads
        return settings

    return extras


def elementwise_gate(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    return {"output_gate": "elementwise"}


def lfm3(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    return {"output_gate": "headwise"} if reader.get("use_attention_gate") else {}


def muse(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    """The model multiplies normalised queries by a factor; here it is part of the scale."""
    factor = reader.get("qk_scale_factor", 1.0)
    return {
        "output_gate": "elementwise",
        "qk_norm_scale": False,
        "scale": reader.need("head_dim") ** -0.5 * factor,
    }


def muse_spark(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    return muse(reader, index, layer_type) | {"context_norm": True}


def gemma3n(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    return {"scale": 1.0, "value_norm": True}


def gemma4(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    """Full layers have wider heads, and may use their keys as values."""
    settings = gemma3n(reader, index, layer_type)
    if layer_type != types.FULL:
        return settings
    k_is_v = reader.get("attention_k_eq_v", False)
    if reader.get("per_layer_config") is None:
        settings["head_dim"] = reader.get("global_head_dim", 512)
        if k_is_v and reader.get("num_global_key_value_heads") is not None:
            settings["num_kv_heads"] = reader.get("num_global_key_value_heads")
    return settings | ({"key_as_value": True} if k_is_v else {})


def diffusion_gemma(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    settings = gemma4(reader, index, layer_type)
    return settings | ({"key_as_value": True} if layer_type == types.FULL else {})


def llama4(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    """Layers that rotate normalise q and k afterwards; the other layers scale q by position."""
    if types.no_rope_layers(reader)[index]:
        if not reader.get("use_qk_norm", True):
            return {}
        return {"qk_norm": True, "qk_norm_after_rope": True, "qk_norm_scale": False}
    if not reader.get("attn_temperature_tuning", True):
        return {}
    floor, scale = reader.get("floor_scale", 8192), reader.get("attn_scale", 0.1)
    return {"query_scaling": QueryScaling(float(scale), int(floor), offset=1)}


def ministral3(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    """Scales queries by position; the config has this under the rotary settings."""
    parameters = rope_parameters(reader, layer_type) or {}
    beta = parameters.get("llama_4_scaling_beta")
    if beta is None:
        return {}
    length = int(parameters["original_max_position_embeddings"])
    return {"query_scaling": QueryScaling(float(beta), length)}


def decoder_only(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    """No settings; refuses an encoder."""
    if not reader.get("is_decoder", False):
        raise reader.refuse("is_decoder", "an encoder's windows are of both sides")
    return {}
