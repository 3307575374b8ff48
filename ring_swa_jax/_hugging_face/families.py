"""Model types whose layers are known, each as a record.

Taken from transformers 5.24.0 and compared with it layer by layer (table in docs/hugging_face.md).
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType

from ring_swa_jax._hugging_face import extras, rotation
from ring_swa_jax._hugging_face import layer_types as types
from ring_swa_jax._hugging_face.family import Family

_unbiased = functools.partial(Family, bias=False, out_bias=False)
_qkv_biased = functools.partial(Family, bias=True, out_bias=False)
_GEMMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6}
_GEMMA2 = Family(
    layer_types=types.every(2),
    norm_offset=1.0,
    defaults=_GEMMA
    | {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256},
)
_GEMMA4 = Family(
    layer_types=types.gemma4,
    qk_norm=True,
    extras=extras.gemma4,
    defaults=_GEMMA
    | {
        "sliding_window": 512,
        "rope_parameters": {
            "sliding_attention": {"rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
            },
        },
    },
)
_MISTRAL = _unbiased(ignored=("layer_types",))
_PHI3 = _unbiased(
    notes="sliding_window=n are n keys, as transformers has it since 4.56. Phi-3's first own code "
    "passed n on to FlashAttention, which sees n + 1 keys: window_size=n gives that.",
)
_PHIMOE = Family(
    defaults={"num_key_value_heads": 8, "rope_theta": 1_000_000.0},
    notes="For sequences past the original length transformers 5.24 keeps the short factors and "
    "takes long_mscale; here, as in the model's own code, the long factors go with it.",
)
_QWEN2 = _qkv_biased(layer_types=types.upper, defaults={"use_sliding_window": False})
_QWEN2_VL = _qkv_biased(
    layer_types=types.upper,
    defaults={"use_sliding_window": False, "rope_theta": 1_000_000.0},
    notes="For text, whose three positions are one; images ask for mrope, which is not here.",
)
_QWEN3 = Family(
    layer_types=types.upper, qk_norm=True, defaults={"use_sliding_window": False, "head_dim": 128}
)
_EXAONE4 = _unbiased(
    layer_types=types.every(4),
    rotates=rotation.where_sliding_if_any,
    qk_norm=True,
    defaults={"sliding_window": 4096, "rms_norm_eps": 1e-5},
)
_GRANITE = Family(
    layer_types=types.every(4, at=0),
    rotates=rotation.by_layer_rope_theta(rotation.always),
    extras=extras.sinks,
    defaults={"sliding_window": 128, "attention_multiplier": 1.0},
)
_CODEC = Family(
    defaults={"sliding_window": 250, "num_attention_heads": 8, "num_key_value_heads": 8},
    aliases={"rms_norm_eps": "norm_eps"},
)
_VOXTRAL = _unbiased()

families: Mapping[str, Family] = MappingProxyType(
    {
        "afmoe": Family(
            layer_types=types.every(4, key="global_attn_every_n_layers"),
            rotates=rotation.where_sliding,
            qk_norm=True,
            extras=extras.elementwise_gate,
            defaults={"sliding_window": 1024, "head_dim": 128, "rms_norm_eps": 1e-5},
        ),
        "blt_patcher": _unbiased(
            interleaved=True, defaults={"sliding_window": 512, "rope_theta": 500_000.0}
        ),
        "cohere2": Family(
            layer_types=types.every(4),
            rotates=rotation.where_sliding,
            interleaved=True,
            defaults={"sliding_window": 4096},
        ),
        "cohere2_moe": Family(
            layer_types=types.after_a_dense_prefix,
            rotates=rotation.where_sliding_or_dense,
            interleaved=True,
            defaults={"sliding_window": 4096, "head_dim": 128},
        ),
        "cohere_compass": Family(
            layer_types=types.full,
            defaults={"sliding_window": 4096},
            notes="For text, whose three positions are one; images ask for mrope, not here.",
        ),
        "cwm": _unbiased(
            layer_types=types.every(4, at=0),
            defaults={
                "sliding_window": 8192,
                "head_dim": 128,
                "rope_theta": 1_000_000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 16.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
        ),
        "diffusion_gemma": Family(
            layer_types=types.gemma4,
            qk_norm=True,
            extras=extras.diffusion_gemma,
            defaults=_GEMMA4.defaults,
            notes="The encoder, which is causal; the decoder's blocks are not.",
        ),
        "dots1": Family(layer_types=types.upper, qk_norm=True, defaults={"sliding_window": 4096}),
        "exaone4": _EXAONE4,
        "exaone_moe": _EXAONE4,
        "flint": Family(
            layer_types=types.flint,
            rotates=rotation.where_sliding,
            qk_norm=True,
            extras=extras.sinks,
            defaults={"sliding_window": 513, "head_dim": 128},
        ),
        "gemma2": _GEMMA2,
        "gemma3": Family(
            layer_types=types.every(6),
            local_theta="rope_local_base_freq",
            qk_norm=True,
            norm_offset=1.0,
            defaults=_GEMMA
            | {
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
            },
        ),
        "gemma3n": Family(
            layer_types=types.every(5),
            local_theta="rope_local_base_freq",
            qk_norm=True,
            extras=extras.gemma3n,
            defaults=_GEMMA
            | {
                "num_key_value_heads": 2,
                "sliding_window": 512,
                "num_kv_shared_layers": 15,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
            },
            ignored=("activation_sparsity_pattern",),
        ),
        "gemma4": _GEMMA4,
        "gemma4_unified": _GEMMA4,
        "gpt_oss": Family(
            layer_types=types.every(2),
            extras=extras.sinks,
            defaults={
                "sliding_window": 128,
                "head_dim": 64,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "attention_bias": True,
                "rms_norm_eps": 1e-5,
                "rope_theta": 150_000.0,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 4096,
                },
            },
            notes="Packed rows are kept apart here by segment_ids; transformers does not separate "
            "this model's documents.",
        ),
        "granite_swa": _GRANITE,
        "granitemoe_swa": _GRANITE,
        "kolibri1": _unbiased(
            layer_types=types.every(5),
            rotates=rotation.where_sliding_if_any,
            qk_norm=True,
            defaults={"sliding_window": 513, "head_dim": 128},
        ),
        "laguna": Family(
            layer_types=types.full,
            qk_norm=True,
            extras=extras.gate("softplus"),
            defaults={
                "sliding_window": 512,
                "head_dim": 128,
                "num_key_value_heads": 8,
                "rope_parameters": {
                    "full_attention": {"rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
                    "sliding_attention": {"rope_theta": 10_000.0},
                },
            },
        ),
        "lara_mini": Family(
            layer_types=types.cycle(
                "linear_attention", types.SLIDING, "linear_attention", types.FULL, types.SLIDING
            ),
            rotates=rotation.where_sliding,
            qk_norm=True,
            defaults={"sliding_window": 512, "head_dim": 128},
            ignored=(
                "linear_conv_kernel_dim",
                "linear_key_head_dim",
                "linear_num_key_heads",
                "linear_num_value_heads",
                "linear_value_head_dim",
            ),
        ),
        "lfm3": Family(
            layer_types=types.lfm3,
            qk_norm=True,
            extras=extras.lfm3,
            defaults={
                "sliding_window": 256,
                "head_dim": 128,
                "use_attention_gate": True,
                "norm_eps": 1e-5,
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "proportional",
                        "partial_rotary_factor": 0.5,
                        "rope_theta": 1_000_000.0,
                    },
                    "sliding_attention": {"rope_theta": 10_000.0},
                },
            },
            aliases={"rms_norm_eps": "norm_eps"},
        ),
        "llama4": Family(
            layer_types=types.with_rope_chunked,
            rotates=rotation.by_no_rope_layers,
            interleaved=True,
            extras=extras.llama4,
            defaults={
                "attention_chunk_size": 8192,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500_000.0,
            },
        ),
        "mellum": Family(
            layer_types=types.full,
            qk_norm=True,
            defaults={
                "sliding_window": 1024,
                "head_dim": 128,
                "rope_parameters": {
                    "full_attention": {"rope_theta": 500_000.0},
                    "sliding_attention": {"rope_theta": 10_000.0},
                },
            },
        ),
        "mimi": _CODEC,
        "mimo_v2_flash": Family(
            layer_types=types.mimo,
            window=types.window_of_mimo,
            local_theta="swa_rope_theta",
            out_bias=False,
            extras=extras.mimo,
            defaults={
                "sliding_window": 129,
                "num_key_value_heads": 4,
                "head_dim": 192,
                "v_head_dim": 128,
                "rope_theta": 5_000_000.0,
                "swa_rope_theta": 10_000.0,
                "partial_rotary_factor": 0.334,
                "attention_value_scale": 0.707,
            },
            notes="sliding_window_size=n are n + 1 keys, as in transformers and SGLang; vLLM is "
            "said to see n.",
        ),
        "minimax": _unbiased(
            layer_types=types.cycle("linear_attention", types.FULL),
            full_slides=True,
            ignored=(
                "full_attn_alpha_factor",
                "full_attn_beta_factor",
                "linear_attn_alpha_factor",
                "linear_attn_beta_factor",
            ),
            defaults={"num_key_value_heads": 8, "rope_theta": 1_000_000.0},
        ),
        "ministral": _unbiased(defaults={"sliding_window": 4096}),
        "ministral3": _unbiased(
            extras=extras.ministral3,
            ignored=("layer_types",),
            defaults={
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1_000_000.0,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 16.0,
                    "original_max_position_embeddings": 16384,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "llama_4_scaling_beta": 0.1,
                },
            },
        ),
        "mistral": _MISTRAL,
        "mixtral": _unbiased(defaults={"num_key_value_heads": 8, "rope_theta": 1_000_000.0}),
        "modernbert-decoder": Family(
            layer_types=types.every(3, at=0, key="global_attn_every_n_layers"),
            window=types.window_of_modernbert_decoder,
            local_theta="local_rope_theta",
            defaults={
                "local_attention": 128,
                "rope_theta": 160_000.0,
                "local_rope_theta": 10_000.0,
            },
            aliases={"rope_theta": "global_rope_theta"},
            notes="local_attention=n are n // 2 keys, as transformers masks them.",
        ),
        "muse_glimmer": Family(
            layer_types=types.every_from_the_last(4),
            rotates=rotation.by_layer_rope_theta(rotation.where_sliding),
            qk_norm=True,
            extras=extras.muse,
            defaults={"sliding_window": 2048, "head_dim": 128, "rms_norm_eps": 1e-5},
        ),
        "muse_spark": Family(
            layer_types=types.every_from_the_last(4),
            rotates=rotation.by_layer_rope_theta(rotation.where_sliding),
            qk_norm=True,
            extras=extras.muse_spark,
            defaults={"sliding_window": 2048, "head_dim": 64, "rms_norm_eps": 1e-5},
        ),
        "olmo3": Family(
            layer_types=types.every(4),
            local_theta="rope_theta",
            qk_norm="all_heads",
            defaults={"sliding_window": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
        ),
        "phi3": _PHI3,
        "phi4_multimodal": _PHI3,
        "phimoe": _PHIMOE,
        "pocket_tts_audio_tokenizer": _CODEC,
        "qwen2": _QWEN2,
        "qwen2_5_omni": _QWEN2_VL,
        "qwen2_5_vl": _QWEN2_VL,
        "qwen2_moe": Family(
            bias="qkv_bias",
            out_bias=False,
            layer_types=types.lower_even,
            defaults={"use_sliding_window": False, "qkv_bias": True},
        ),
        "qwen2_vl": _QWEN2_VL,
        "qwen3": _QWEN3,
        "qwen3_moe": Family(
            qk_norm=True, defaults={"use_sliding_window": False, "num_key_value_heads": 4}
        ),
        "qwen3_omni_moe": Family(
            layer_types=types.full,
            qk_norm=True,
            defaults={"num_key_value_heads": 4, "rope_theta": 1_000_000.0},
            notes="For text, whose three positions are one; images ask for mrope, not here.",
        ),
        "qwen3_omni_moe_code2wav": Family(
            defaults={
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "sliding_window": 72,
                "rms_norm_eps": 1e-5,
            },
        ),
        "recurrent_gemma": Family(
            layer_types=types.cycle("recurrent", "recurrent", "attention", key="block_types"),
            out_bias=True,
            defaults={
                "attention_window_size": 2048,
                "head_dim": 256,
                "num_attention_heads": 10,
                "partial_rotary_factor": 0.5,
            },
            aliases={"sliding_window": "attention_window_size", "block_types": "_block_types"},
            ignored=("logits_soft_cap",),  # of the vocabulary
        ),
        "smollm3": Family(
            layer_types=types.without_rope_slides,
            rotates=rotation.by_no_rope_layers,
            defaults={"use_sliding_window": False, "rope_theta": 2_000_000.0},
        ),
        "starcoder2": Family(bias="use_bias", out_bias="use_bias", defaults={"use_bias": True}),
        "step3p5": Family(
            layer_types=types.full,
            qk_norm=True,
            norm_offset=1.0,
            extras=extras.gate("sigmoid"),
            defaults={"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5},
        ),
        "t5_gemma_module": dataclasses.replace(
            _GEMMA2,
            extras=extras.decoder_only,
            ignored=("cross_attention_hidden_size",),
            notes="The decoder's attention to itself; the encoder's windows are of both sides.",
        ),
        "vaultgemma": _GEMMA2,
        "voxtral_realtime": _VOXTRAL,
    }
)
