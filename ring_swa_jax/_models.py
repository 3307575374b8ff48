"""Attention settings of published models, by name: what their config.json says of attention."""

import copy
from typing import Any

from ring_swa_jax._hugging_face import settings_from_hugging_face
from ring_swa_jax._model_layers import ModelLayers


def layer_settings(model: str) -> ModelLayers:
    """Attention settings of a published model, by name.

    A model's attention is then a list: ``settings = layer_settings("gemma3_4b")`` and
    ``[RingSlidingWindowAttention(**settings.kinds[kind], rngs=rngs) for kind in settings.layers]``.
    Window sizes are of this library: W means **W + 1 keys**. Any other model's come from its
    config.json through `settings_from_hugging_face`, as these did. The settings are yours to
    change: each call returns new ones.

    Args:
        model: a name in `ring_swa_jax.models`.

    Raises:
        ValueError: no such name.
    """
    if model not in models:
        raise ValueError(
            f"no settings for {model!r}; there are some for {', '.join(models)}, and "
            "settings_from_hugging_face has them for any config.json"
        )
    return copy.deepcopy(models[model])


def _yarn(factor: float, original_length: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original_length,
    } | more


def _sizes(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, num_layers: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": num_layers,
    }


def _gemma3(sizes: dict[str, Any], window: int, scalar: int, factor: float | None = None):
    scaling = None if factor is None else {"rope_type": "linear", "factor": factor}
    return sizes | {
        "model_type": "gemma3_text",
        "sliding_window": window,
        "query_pre_attn_scalar": scalar,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": scaling,
    }


def _gpt_oss(num_layers: int) -> dict[str, Any]:
    return _sizes(2880, 64, 8, 64, num_layers) | {
        "model_type": "gpt_oss",
        "sliding_window": 128,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": _yarn(32.0, 4096, beta_fast=32.0, beta_slow=1.0, truncate=False),
    }


def _olmo3(sizes: dict[str, Any]) -> dict[str, Any]:
    return sizes | {
        "model_type": "olmo3",
        "sliding_window": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500_000.0,
        "rope_scaling": _yarn(8.0, 8192, attention_factor=1.2079441541679836),
    }


# name: (repository on the Hub, what else tells of it, the deciding keys of its config.json)
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral_7b": (
        "mistralai/Mistral-7B-v0.1",
        "arXiv:2310.06825",
        _sizes(4096, 32, 8, 128, 32)
        | {
            "model_type": "mistral",
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
        },
    ),
    "phi3_mini": (
        "microsoft/Phi-3-mini-4k-instruct",
        "arXiv:2404.14219",
        _sizes(3072, 32, 32, 96, 32)
        | {
            "model_type": "phi3",
            "sliding_window": 2047,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
        },
    ),
    "gemma2_9b": (
        "google/gemma-2-9b",
        "arXiv:2408.00118",
        _sizes(3584, 16, 8, 256, 42)
        | {
            "model_type": "gemma2",
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
        },
    ),
    "gemma3_270m": (
        "google/gemma-3-270m",
        "arXiv:2503.19786",
        _gemma3(_sizes(640, 4, 1, 256, 18), 512, 256),
    ),
    "gemma3_4b": (
        "google/gemma-3-4b-pt",
        "arXiv:2503.19786",
        _gemma3(_sizes(2560, 8, 4, 256, 34), 1024, 256, 8.0),
    ),
    "gemma3_27b": (
        "google/gemma-3-27b-pt",
        "arXiv:2503.19786",
        _gemma3(_sizes(5376, 32, 16, 128, 62), 1024, 168, 8.0),
    ),
    "gpt_oss_20b": ("openai/gpt-oss-20b", "arXiv:2508.10925", _gpt_oss(24)),
    "gpt_oss_120b": ("openai/gpt-oss-120b", "arXiv:2508.10925", _gpt_oss(36)),
    "mimo_v2_flash": (
        "XiaomiMiMo/MiMo-V2-Flash",
        "arXiv:2601.02780",
        _sizes(4096, 64, 4, 192, 48)
        | {
            "model_type": "mimo_v2_flash",
            "v_head_dim": 128,
            "swa_num_key_value_heads": 8,
            "sliding_window_size": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5_000_000.0,
            "swa_rope_theta": 10_000.0,
            "partial_rotary_factor": 0.334,
            "attention_value_scale": 0.707,
        },
    ),
    "olmo3_7b": (
        "allenai/Olmo-3-1025-7B",
        "arXiv:2512.13961",
        _olmo3(_sizes(4096, 32, 32, 128, 32)),
    ),
    "olmo3_32b": (
        "allenai/Olmo-3-1125-32B",
        "arXiv:2512.13961",
        _olmo3(_sizes(5120, 40, 8, 128, 64)),
    ),
    "command_a": (
        "CohereLabs/c4ai-command-a-03-2025",
        "arXiv:2504.00698",
        _sizes(12288, 96, 8, 128, 64)
        | {
            "model_type": "cohere2",
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "rope_theta": 50_000.0,
        },
    ),
}

models: dict[str, ModelLayers] = {
    name: settings_from_hugging_face(
        config, source=f"https://huggingface.co/{repository}, config.json; {paper}"
    )
    for name, (repository, paper, config) in _CONFIGS.items()
}
