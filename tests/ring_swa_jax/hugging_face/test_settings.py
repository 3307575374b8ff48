"""What a config.json says of attention: keys that decide, of both versions, and what is refused."""

import pytest

import ring_swa_jax as rsj
from ring_swa_jax import settings_from_hugging_face

LLAMA = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "vocab_size": 100,
    "intermediate_size": 128,
}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 8}


def one(config):
    """Settings of the only kind."""
    (kind,) = settings_from_hugging_face(config).kinds.values()
    return kind


def test_sizes_and_window():
    kind = one(LLAMA | {"model_type": "mistral", "sliding_window": 7})
    assert kind["in_features"] == 64
    assert (kind["num_heads"], kind["num_kv_heads"], kind["head_dim"]) == (4, 2, 16)
    assert kind["window_size"] == 6
    assert kind["rope"] == rsj.Rope(5e5)
    assert kind["use_bias"] is False


def test_a_written_null_is_no_default():
    kind = one(LLAMA | {"model_type": "mistral", "sliding_window": None, "head_dim": None})
    assert kind["window_size"] is None
    assert kind["head_dim"] == 16


def test_below_text_config():
    whole = {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": {"hidden_size": 3}}
    assert settings_from_hugging_face(whole).kinds == settings_from_hugging_face(GEMMA3).kinds


def test_old_and_new_rotary_settings_are_the_same():
    old = GEMMA3 | {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    }
    new = {key: value for key, value in GEMMA3.items() if key != "rope_theta"} | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        }
    }
    new["num_hidden_layers"] = old["num_hidden_layers"] = 6
    layers = settings_from_hugging_face(old)
    assert layers.kinds == settings_from_hugging_face(new).kinds
    assert layers.kinds["global"]["rope"] == rsj.Rope(1e6, scaling=rsj.LinearScaling(8.0))
    assert layers.kinds["local"]["rope"] == rsj.Rope(1e4)


@pytest.mark.parametrize(
    ("more", "layers"),
    [
        ({"model_type": "gemma2", "sliding_window": 8}, "lglg"),
        ({"model_type": "olmo3", "sliding_window": 8}, "lllg"),
        ({"model_type": "cohere2", "sliding_window": 8, "sliding_window_pattern": 2}, "lglg"),
        ({"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": "LLG"}, "llgl"),
        ({"model_type": "exaone4", "sliding_window": None}, "gggg"),
        ({"model_type": "cwm", "sliding_window": 8}, "glll"),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            "gggl",
        ),
        ({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 3}, "gggg"),
        (
            {
                "model_type": "gemma2",
                "sliding_window": 8,
                "layer_types": ["full_attention"] * 3 + ["sliding_attention"],
            },
            "gggl",
        ),
    ],
)
def test_which_layer_is_which(more, layers):
    kinds = settings_from_hugging_face(LLAMA | more).layers
    assert "".join(kind[0] for kind in kinds) == layers


def test_layers_that_are_no_attention_have_no_settings():
    layers = settings_from_hugging_face(LLAMA | {"model_type": "lfm3", "sliding_window": 8})
    assert layers.layers[:3] == ("conv", "conv", "global")
    assert set(layers.kinds) == {"global"}


def test_layers_of_one_type_that_differ_are_numbered():
    config = LLAMA | {
        "model_type": "granite_swa",
        "sliding_window": 8,
        "layer_rope_theta": [0, 1e4, 0, 1e4],
    }
    layers = settings_from_hugging_face(config)
    assert layers.layers == ("global", "local", "local_2", "local")
    assert layers.kinds["local_2"]["rope"] is None


def test_shared_keys_come_from_the_last_layer_of_their_type():
    config = GEMMA3 | {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }
    layers = settings_from_hugging_face(config)
    assert layers.kv_from == (None, None, None, 1, 2, 1)
    assert layers.layers[3:] == ("global_kv_shared", "local_kv_shared", "global_kv_shared")
    assert layers.kinds["global_kv_shared"]["kv_shared"]


def test_the_longest_sequence_chooses_the_factors_of_longrope():
    config = LLAMA | {
        "model_type": "phi3",
        "max_position_embeddings": 4096 * 4,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    }
    short, long, default = (
        settings_from_hugging_face(config, max_length=n).kinds["global"]["rope"].scaling
        for n in (4096, 4097, None)
    )
    assert short.factors == (1.0,) * 8
    assert long.factors == default.factors == (2.0,) * 8
    # sqrt(1 + log(4) / log(4096))
    assert short.attention_factor == pytest.approx(1.0801234497346435)


def test_yarn_with_mscale():
    config = LLAMA | {
        "model_type": "mistral",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 1024,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
    assert one(config)["rope"].scaling.magnitude() == 1.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model_type": "gemma3", "use_bidirectional_attention": True}, "bidirectional.*True"),
        ({"model_type": "gemma3", "is_causal": False}, "is_causal=False.*by hand"),
        ({"model_type": "mistral", "attention_sink_size": 4}, "attention_sink_size=4"),
        ({"model_type": "mistral", "rope_scaling": {"rope_type": "dynamic"}}, "'dynamic'"),
        (
            {"model_type": "mistral", "rope_scaling": {"type": "linear", "factor": 2, "odd": 3}},
            "odd.*3",
        ),
        (
            {"model_type": "modernbert", "local_attention": 128},
            "modernbert.*both sides.*by hand",
        ),
        ({"model_type": "zaya"}, "zaya.*convolutions"),
        ({"model_type": "blt"}, "blt.*bytes and patches.*patcher_config"),
        ({"model_type": "newcomer", "clever_trick": 7}, "newcomer.*clever_trick=7"),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"1": {"sliding_window": 3}}},
            "per_layer_config.*sliding_window.*3",
        ),
        (
            {"model_type": "mimo_v2_flash", "swa_head_dim": 64, "head_dim": 192},
            "swa_head_dim=64.*192",
        ),
    ],
)
def test_what_is_not_understood_raises(more, message):
    with pytest.raises(NotImplementedError, match=message):
        settings_from_hugging_face(LLAMA | more)


def test_an_unknown_type_whose_keys_are_all_known_says_so():
    layers = settings_from_hugging_face(LLAMA | {"model_type": "newcomer", "sliding_window": 8})
    assert layers.kinds["local"]["window_size"] == 7
    assert "'newcomer' is not known" in layers.notes


def test_what_is_missing_is_named():
    config = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="no 'hidden_size'"):
        settings_from_hugging_face(config | {"model_type": "mistral"})


@pytest.mark.usefixtures("unchecked_signatures")
def test_a_config_object_is_told_to_become_a_mapping():
    with pytest.raises(TypeError, match="to_dict"):
        settings_from_hugging_face(object())


def test_layer_types_of_another_length():
    with pytest.raises(ValueError, match=r"3 entries.*num_hidden_layers=4"):
        settings_from_hugging_face(
            LLAMA | {"model_type": "gemma2", "layer_types": ["full_attention"] * 3}
        )


def test_disputed_windows_follow_transformers_and_say_so():
    phi3 = settings_from_hugging_face(LLAMA | {"model_type": "phi3", "sliding_window": 2047})
    assert phi3.kinds["local"]["window_size"] == 2046
    assert "FlashAttention" in phi3.notes
    mimo = rsj.layer_settings("mimo_v2_flash")
    assert mimo.kinds["local"]["window_size"] == 128
    assert "vLLM" in mimo.notes
