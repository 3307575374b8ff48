"""What the API reference describes, in its order."""

PAGE = """\
# API reference

<!-- Written by docs/make_api.py from the docstrings. -->

Dimensions: B batch, S whole sequence, T a device's chunk of it (or new tokens), N query heads, K
key/value heads (N is a multiple of K), H features of a query or key head, Hv of a value head, E
features of a layer's input. A `window_size` of W means **W + 1 keys**: the W before a query and the
query's own. An `AxisName` is the name of a mesh axis, or a tuple of names, major first. Names are
those of `ring_swa_jax` unless another module is named.

{contents}
"""

# Methods and properties, and where they are not the module's own, names stand behind their class.
LAYER = ("__call__", "prefill", "decode", "init_cache", "keys_values")
SECTIONS: dict[str, tuple[str | tuple[str, tuple[str, ...]], ...]] = {
    "Global arrays": ("ring_attention", "reference_attention", "RepeatedWorkWarning"),
    "Inside `jax.shard_map`": (
        "ring_sliding_window_attn",
        "ring_streaming_llm_attn",
        "ring_sliding_window_attn_varlen",
        "ring_streaming_llm_attn_varlen",
    ),
    "Flax NNX": (("nnx.RingSlidingWindowAttention", LAYER), "nnx.attention_fn"),
    "Flax Linen": (("linen.RingSlidingWindowAttention", LAYER), "linen.attention_fn"),
    "Decoding without Flax": (
        ("Cache", ("num_slots", "max_length", "max_trim")),
        "init_cache",
        "prefill_cache",
        "decode_attention",
        "next_positions",
        "trim_cache",
    ),
    "Positions": (
        "segment_positions",
        "chunk_segment_ids",
        "apply_rope",
        "Rope",
        "LinearScaling",
        "YarnScaling",
        "Llama3Scaling",
        "LongRopeScaling",
        "ProportionalScaling",
        "QueryScaling",
    ),
    "Models": (
        "layer_settings",
        "settings_from_hugging_face",
        "weights_from_hugging_face",
        "weights_to_hugging_face",
        ("ModelLayers", ("num_layers",)),
        "Checkpoint",
        "models",
    ),
    "Processes and devices": ("check_processes", "half_precision_dtype"),
}
# What has no docstring of its own.
TEXTS = {"models": "A dictionary of [`ModelLayers`](#modellayers): what `layer_settings` looks up."}
