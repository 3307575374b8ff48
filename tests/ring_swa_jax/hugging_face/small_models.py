"""Every model of transformers that the golden files are about, made small. Needs torch.

A window of 6 keys on rows of 16 tokens cuts off most of them. Sizes are alike where a model allows
it, so that layers share compiled programs.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "vocab_size": 32,
    "intermediate_size": 16,
    "sliding_window": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_dense_layers": 1,
    "n_shared_experts": 1,
    "v_head_dim": 4,
    "attention_multiplier": 1.0,
    "query_pre_attn_scalar": 21,
    "rms_norm_eps": 1e-3,  # large, so that another one shows
}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    },
}
ALTERNATE = ["sliding_attention", "full_attention"] * 2
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 5.0, 9.0],
    "original_max_position_embeddings": 4,  # less than each document, as transformers chooses anew
}


@dataclasses.dataclass(frozen=True)
class Small:
    """A model of transformers.

    Attributes:
        folder: of transformers.models.
        config: name of the text decoder's config class.
        model: name of its class.
        settings: of the config, besides `SIZES`.
        layers: the layers to compare.
        max_length: for LongRoPE.
        model_type: for config.json, where the class has none.
    """

    folder: str
    config: str
    model: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: tuple[int, ...] = (0,)
    max_length: int | None = None
    model_type: str = ""

    def make_config(self):
        """The small config."""
        cls = getattr(_module(self.folder, "configuration"), self.config)
        names = {field.name for field in dataclasses.fields(cls)} | set(
            getattr(cls, "attribute_map", {})
        )
        sizes = {key: value for key, value in SIZES.items() if key in names}
        return cls(**{**sizes, **self.settings})

    def make_model(self, config):
        """The model, with eager attention."""
        config._attn_implementation = "eager"
        cls = getattr(_module(self.folder, "modeling"), self.model)
        return (cls._from_config if hasattr(cls, "_from_config") else cls)(config).eval()


def _module(folder: str, kind: str):
    return importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}")


def _usual(prefix: str, folder: str, *, text: str = "", **options) -> Small:
    return Small(folder, f"{prefix}{text}Config", f"{prefix}{text}Model", **options)


SMALL: dict[str, Small] = {
    "afmoe": _usual("Afmoe", "afmoe", layers=(0, 3)),
    "blt_patcher": Small("blt", "BltPatcherConfig", "BltPatcher"),
    "cohere2": _usual("Cohere2", "cohere2", layers=(0, 3)),
    "cohere2_moe": _usual("Cohere2Moe", "cohere2_moe", layers=(0, 3)),
    "cohere_compass": _usual(
        "CohereCompass", "cohere_compass", text="Text", layers=(0, 1),
        settings={
            "layer_types": ALTERNATE,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0,
                                      "mrope_section": [2, 1, 1]},
                "full_attention": None,
            },
        },
    ),
    "cwm": _usual("Cwm", "cwm", layers=(0, 1)),
    "diffusion_gemma": Small(
        "diffusion_gemma", "DiffusionGemmaTextConfig", "DiffusionGemmaEncoderTextModel",
        settings={"global_head_dim": 16, "layer_types": ALTERNATE, "num_experts": 2,
                  "top_k_experts": 1}, layers=(0, 1),
    ),
    "dots1": _usual("Dots1", "dots1", layers=(0, 2)),
    "exaone4": _usual("Exaone4", "exaone4", layers=(0, 3)),
    "exaone_moe": _usual("ExaoneMoe", "exaone_moe", layers=(0, 3)),
    "flint": _usual("Flint", "flint", layers=(0, 2)),
    "gemma2": _usual("Gemma2", "gemma2", layers=(0, 1)),
    "gemma3": _usual(
        "Gemma3", "gemma3", text="Text", layers=(0, 3),
        settings={"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    ),
    "gemma3n": _usual(
        "Gemma3n", "gemma3n", text="Text", layers=(0, 1, 2, 3),
        settings={"layer_types": ALTERNATE, "num_kv_shared_layers": 2,
                  "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 32,
                  "intermediate_size": [16] * 4, "laurel_rank": 4,
                  "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4": _usual(
        "Gemma4", "gemma4", text="Text", layers=(0, 1, 2, 3),
        settings={"layer_types": ALTERNATE, "num_kv_shared_layers": 2, "global_head_dim": 16,
                  "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 32,
                  "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4_unified": _usual(
        "Gemma4Unified", "gemma4_unified", text="Text", layers=(0, 1),
        settings={"layer_types": ALTERNATE, "global_head_dim": 16},
    ),
    "gpt_oss": _usual(
        "GptOss", "gpt_oss", layers=(0, 1),
        settings={"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 4.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 16}},
    ),
    "granite_swa": _usual(
        "GraniteSWA", "granite_swa", layers=(0, 1),
        settings={"layer_rope_theta": [0, 500.0, 500.0, 500.0]},
    ),
    "granitemoe_swa": _usual("GraniteMoeSWA", "granitemoe_swa", layers=(0, 1)),
    "kolibri1": _usual("Kolibri1", "kolibri1", layers=(0, 3),
                       settings={"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "laguna": _usual(
        "Laguna", "laguna", layers=(0, 1),
        settings={"layer_types": ALTERNATE, "num_attention_heads_per_layer": [4, 2, 4, 2]},
    ),
    "lara_mini": _usual("LaraMini", "lara_mini", layers=(1, 3),
                        settings={"linear_num_key_heads": 2, "linear_num_value_heads": 2,
                                  "linear_key_head_dim": 4, "linear_value_head_dim": 4}),
    "lfm3": _usual("Lfm3", "lfm3", layers=(2, 4), settings={"num_hidden_layers": 5}),
    "llama4": _usual(
        "Llama4", "llama4", text="Text", layers=(0, 3),
        settings={"attention_chunk_size": 6, "floor_scale": 5, "head_dim": 8,
                  "intermediate_size_mlp": 16},
    ),
    "mellum": _usual("Mellum", "mellum", layers=(0, 1), settings={"layer_types": ALTERNATE}),
    "mimi": Small("mimi", "MimiConfig", "MimiTransformerModel"),
    "mimo_v2_flash": _usual("MiMoV2Flash", "mimo_v2_flash", layers=(0, 1),
                            settings={"head_dim": 12}),
    "minimax": _usual("MiniMax", "minimax", settings={"block_size": 8}),
    "ministral": _usual("Ministral", "ministral"),
    "ministral3": _usual(
        "Ministral3", "ministral3",
        settings={"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "beta_fast": 4.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.3,
            "original_max_position_embeddings": 8}},
    ),
    "mistral": _usual("Mistral", "mistral"),
    "mixtral": _usual("Mixtral", "mixtral"),
    "modernbert_decoder": _usual("ModernBertDecoder", "modernbert_decoder", layers=(0, 1),
                                 settings={"local_attention": 12}),
    "muse_glimmer": _usual("MuseGlimmer", "muse_glimmer", text="Text", layers=(0, 3)),
    "muse_spark": _usual("MuseSpark", "muse_spark", text="Text", layers=(0, 3)),
    "olmo3": _usual("Olmo3", "olmo3", layers=(0, 3)),
    "phi3": _usual("Phi3", "phi3"),
    "phi3_long": _usual(
        "Phi3", "phi3", max_length=64,
        settings={"rope_parameters": _LONG, "original_max_position_embeddings": 4},
    ),
    "phi4_multimodal": _usual(
        "Phi4Multimodal", "phi4_multimodal", max_length=32,
        settings={"rope_parameters": _LONG | {"original_max_position_embeddings": 32},
                  "original_max_position_embeddings": 32},
    ),
    "phimoe": _usual(
        "Phimoe", "phimoe", max_length=32,
        settings={"rope_parameters": _LONG | {
            "original_max_position_embeddings": 32, "short_mscale": 1.2, "long_mscale": 1.3}},
    ),
    "pocket_tts_audio_tokenizer": Small(
        "pocket_tts_audio_tokenizer", "PocketTTSAudioTokenizerConfig",
        "PocketTTSAudioTokenizerTransformerModel"),
    "qwen2": _usual("Qwen2", "qwen2", layers=(0, 2)),
    "qwen2_5_omni": Small("qwen2_5_omni", "Qwen2_5OmniTextConfig",
                          "Qwen2_5OmniThinkerTextModel", layers=(0, 2), settings=_MROPE),
    "qwen2_5_vl": Small("qwen2_5_vl", "Qwen2_5_VLTextConfig", "Qwen2_5_VLTextModel",
                        layers=(0, 2), settings=_MROPE),
    "qwen2_moe": _usual("Qwen2Moe", "qwen2_moe", layers=(0, 1)),
    "qwen2_vl": Small("qwen2_vl", "Qwen2VLTextConfig", "Qwen2VLTextModel", layers=(0, 2),
                     settings=_MROPE),
    "qwen3": _usual("Qwen3", "qwen3", layers=(0, 2)),
    "qwen3_moe": _usual("Qwen3Moe", "qwen3_moe"),
    "qwen3_omni_moe": Small(
        "qwen3_omni_moe", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel",
        settings=_MROPE),
    "qwen3_omni_moe_code2wav": Small(
        "qwen3_omni_moe", "Qwen3OmniMoeCode2WavConfig", "Qwen3OmniMoeCode2WavTransformerModel",
        model_type="qwen3_omni_moe_code2wav"),
    "recurrent_gemma": _usual("RecurrentGemma", "recurrent_gemma", layers=(2,)),
    "smollm3": _usual("SmolLM3", "smollm3", layers=(0, 3)),
    "starcoder2": _usual("Starcoder2", "starcoder2"),
    "step3p7": _usual(
        "Step3p7", "step3p7", text="Text", layers=(0, 1),
        settings={"layer_types": ALTERNATE, "num_sliding_attention_heads": 2,
                  "rope_parameters": {
                      "full_attention": {"rope_type": "default", "rope_theta": 1000.0,
                                         "partial_rotary_factor": 0.5},
                      "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
                  "share_expert_dim": 8},
    ),
    "t5gemma": Small("t5gemma", "T5GemmaModuleConfig", "T5GemmaDecoder", layers=(0, 1),
                     settings={"is_decoder": True, "cross_attention_hidden_size": 32,
                               "dropout_rate": 0.0}),
    "vaultgemma": _usual("VaultGemma", "vaultgemma", layers=(0, 1)),
    "voxtral_realtime": Small("voxtral_realtime", "VoxtralRealtimeTextConfig",
                              "VoxtralRealtimeTextModel"),
}  # fmt: skip
