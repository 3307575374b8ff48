"""Model types whose settings are not read, each with what its attention needs besides."""

from collections.abc import Mapping
from types import MappingProxyType

_BOTH_SIDES = (
    "windows to both sides of a query; write the layers' settings by hand, with window_size=(L, R)"
)
_PATCHES = (
    "attention across sequences of bytes and patches; the layers of its patcher_config are read"
)

refused: Mapping[str, str] = MappingProxyType(
    {
        "beam": "a query scale that is a power of the position",
        "blt": _PATCHES,
        "blt_local_decoder": _PATCHES,
        "blt_local_encoder": _PATCHES,
        "deepseek_v4": "keys that are compressed",
        "doge": "a mask that is computed from the values",
        "dory": "norms and factors of its own",
        "dots3_note": "keys that are compressed",
        "embedding_gemma2": _BOTH_SIDES,
        "embeddinggemma": _BOTH_SIDES,
        "esmfold2": _BOTH_SIDES,
        "gemma4_assistant": "attention to another model's keys",
        "gemma4_unified_assistant": "attention to another model's keys",
        "inkling": "biases by distance",
        "inkling2": "biases by distance",
        "inkling2_loop": "biases by distance",
        "modernbert": _BOTH_SIDES,
        "moonshine_streaming": _BOTH_SIDES,
        "muse_glimmer_assistant": _BOTH_SIDES,
        "neomme": _BOTH_SIDES,
        "openai_privacy_filter": _BOTH_SIDES,
        "paligemma": "a prefix that is seen from both sides",
        "t5gemma2": _BOTH_SIDES,
        "t5gemma2_encoder": _BOTH_SIDES,
        "t5gemma2_text": _BOTH_SIDES,
        "ultrabert": _BOTH_SIDES,
        "unlimited_ocr": "a mask that refers to another document",
        "zaya": "convolutions on keys",
    }
)
