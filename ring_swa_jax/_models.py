"""Attention settings of published models, as data.

``sliding_window = n`` of a config.json is ``window_size = n - 1`` here, except for Phi-3, whose
own program passes its n on to FlashAttention as the window (n, n).
"""

import copy
import dataclasses
from typing import Any

from ring_swa_jax._rope import Rope
from ring_swa_jax._rope_scaling import LinearScaling, YarnScaling


@dataclasses.dataclass(frozen=True)
class ModelLayers:
    """The attention layers of a model.

    Attributes:
        source: where the numbers are from.
        num_layers: how many layers the model has.
        pattern: kinds of layers, repeated from the first layer on to ``num_layers``.
        kinds: settings of each kind, keyword arguments of
            `ring_swa_jax.nnx.RingSlidingWindowAttention`.
        first: kinds of the first layers, before the pattern begins.
        notes: what the settings do not say and a checkpoint asks for.
    """

    source: str
    num_layers: int
    pattern: tuple[str, ...]
    kinds: dict[str, dict[str, Any]]
    first: tuple[str, ...] = ()
    notes: str = ""

    def __hash__(self) -> int:
        kinds = frozenset((kind, frozenset(own.items())) for kind, own in self.kinds.items())
        return hash((self.source, self.num_layers, self.pattern, kinds, self.first, self.notes))

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of every layer."""
        repeated = self.pattern * self.num_layers
        return (*self.first, *repeated)[: self.num_layers]


def layer_settings(model: str) -> ModelLayers:
    """Attention settings of a published model, by name.

    A model's attention is then a list: ``settings = layer_settings("gemma3_4b")`` and
    ``[RingSlidingWindowAttention(**settings.kinds[kind], rngs=rngs) for kind in settings.layers]``.
    Window sizes are of this library: W means **W + 1 keys**. The settings are yours to change:
    each call returns new ones.

    Args:
        model: a name in `ring_swa_jax.models`.

    Raises:
        ValueError: no such name.
    """
    if model not in models:
        raise ValueError(f"no settings for {model!r}; there are some for {', '.join(models)}")
    return copy.deepcopy(models[model])


def _kinds(common: dict[str, Any], **kinds: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {kind: common | own for kind, own in kinds.items()}


def _sizes(in_features: int, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "in_features": in_features,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "use_bias": False,
    }


_HUB = "https://huggingface.co/"
_ONE_TO_ONE = ("local", "global")
_THREE_TO_ONE = ("local",) * 3 + ("global",)
_FIVE_TO_ONE = ("local",) * 5 + ("global",)
_GEMMA_NOTES = "The checkpoint has the factors of the norms less one: add 1 to them."


def _gemma3(name: str, sizes: dict[str, Any], *, window_size: int, num_layers: int,
            pre_attention_scalar: int, scaling: LinearScaling | None) -> ModelLayers:  # fmt: skip
    return ModelLayers(
        source=f"{_HUB}google/{name}, config.json; arXiv:2503.19786",
        num_layers=num_layers,
        pattern=_FIVE_TO_ONE,
        kinds=_kinds(
            sizes | {"scale": pre_attention_scalar**-0.5, "qk_norm": True, "qk_norm_epsilon": 1e-6},
            local={"window_size": window_size, "rope": Rope(10_000.0)},
            **{"global": {"window_size": None, "rope": Rope(1_000_000.0, scaling=scaling)}},
        ),
        notes=_GEMMA_NOTES,
    )


def _gpt_oss(name: str, num_layers: int) -> ModelLayers:
    yarn = YarnScaling(32.0, 4096, beta_fast=32.0, beta_slow=1.0, truncate=False)
    common = _sizes(2880, 64, 8, 64) | {
        "use_bias": True,
        "learned_sinks": True,
        "rope": Rope(150_000.0, scaling=yarn),
    }
    return ModelLayers(
        source=f"{_HUB}openai/{name}, config.json; arXiv:2508.10925",
        num_layers=num_layers,
        pattern=_ONE_TO_ONE,
        kinds=_kinds(common, local={"window_size": 127}, **{"global": {"window_size": None}}),
    )


def _olmo3(name: str, sizes: dict[str, Any], num_layers: int) -> ModelLayers:
    yarn = YarnScaling(8.0, 8192, attention_factor=1.2079441541679836)
    return ModelLayers(
        source=f"{_HUB}allenai/{name}, config.json; arXiv:2512.13961",
        num_layers=num_layers,
        pattern=_THREE_TO_ONE,
        kinds=_kinds(
            sizes | {"qk_norm": "all_heads", "qk_norm_epsilon": 1e-6},
            local={"window_size": 4095, "rope": Rope(500_000.0)},
            **{"global": {"window_size": None, "rope": Rope(500_000.0, scaling=yarn)}},
        ),
    )


models: dict[str, ModelLayers] = {
    "mistral_7b": ModelLayers(
        source=f"{_HUB}mistralai/Mistral-7B-v0.1, config.json; arXiv:2310.06825",
        num_layers=32,
        pattern=("local",),
        kinds=_kinds(_sizes(4096, 32, 8, 128), local={"window_size": 4095, "rope": Rope(10_000.0)}),
    ),
    "phi3_mini": ModelLayers(
        source=f"{_HUB}microsoft/Phi-3-mini-4k-instruct, config.json and modeling_phi3.py",
        num_layers=32,
        pattern=("local",),
        kinds=_kinds(_sizes(3072, 32, 32, 96), local={"window_size": 2047, "rope": Rope(10_000.0)}),
    ),
    "gemma2_9b": ModelLayers(
        source=f"{_HUB}google/gemma-2-9b, config.json; arXiv:2408.00118",
        num_layers=42,
        pattern=_ONE_TO_ONE,
        kinds=_kinds(
            _sizes(3584, 16, 8, 256)
            | {"scale": 256**-0.5, "logits_soft_cap": 50.0, "rope": Rope(10_000.0)},
            local={"window_size": 4095},
            **{"global": {"window_size": None}},
        ),
    ),
    "gemma3_270m": _gemma3(
        "gemma-3-270m",
        _sizes(640, 4, 1, 256),
        window_size=511,
        num_layers=18,
        pre_attention_scalar=256,
        scaling=None,
    ),
    "gemma3_4b": _gemma3(
        "gemma-3-4b-pt",
        _sizes(2560, 8, 4, 256),
        window_size=1023,
        num_layers=34,
        pre_attention_scalar=256,
        scaling=LinearScaling(8.0),
    ),
    "gemma3_27b": _gemma3(
        "gemma-3-27b-pt",
        _sizes(5376, 32, 16, 128),
        window_size=1023,
        num_layers=62,
        pre_attention_scalar=168,
        scaling=LinearScaling(8.0),
    ),
    "gpt_oss_20b": _gpt_oss("gpt-oss-20b", 24),
    "gpt_oss_120b": _gpt_oss("gpt-oss-120b", 36),
    "mimo_v2_flash": ModelLayers(
        source=f"{_HUB}XiaomiMiMo/MiMo-V2-Flash, config.json; arXiv:2601.02780",
        num_layers=48,
        first=("global",) + ("local",) * 4 + ("global",),
        pattern=_FIVE_TO_ONE,
        kinds=_kinds(
            _sizes(4096, 64, 8, 192) | {"value_dim": 128},
            local={
                "window_size": 127,
                "learned_sinks": True,
                "rope": Rope(10_000.0, rotary_dim=64),
            },
            **{
                "global": {
                    "window_size": None,
                    "num_kv_heads": 4,
                    "rope": Rope(5_000_000.0, rotary_dim=64),
                }
            },
        ),
        notes="The values are multiplied by attention_value_scale=0.707: multiply the kernel "
        "of the values by it.",
    ),
    "olmo3_7b": _olmo3("Olmo-3-1025-7B", _sizes(4096, 32, 32, 128), 32),
    "olmo3_32b": _olmo3("Olmo-3-1125-32B", _sizes(5120, 40, 8, 128), 64),
    "command_a": ModelLayers(
        source=f"{_HUB}CohereLabs/c4ai-command-a-03-2025, config.json; arXiv:2504.00698",
        num_layers=64,
        pattern=_THREE_TO_ONE,
        kinds=_kinds(
            _sizes(12288, 96, 8, 128),
            local={"window_size": 4095, "rope": Rope(50_000.0, interleaved=True)},
            **{"global": {"window_size": None, "rope": None}},
        ),
    ),
}
