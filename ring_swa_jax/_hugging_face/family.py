"""What a model type's layers do that its config.json does not say, as a record."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ring_swa_jax._hugging_face import layer_types as types
from ring_swa_jax._hugging_face import rotation
from ring_swa_jax._hugging_face.layer_types import LayerTypes
from ring_swa_jax._hugging_face.reader import Reader
from ring_swa_jax._hugging_face.rotation import Rotates

Bias = bool | str  # a key's name, or what the model always does
Extras = Callable[[Reader, int, str], dict[str, Any]]  # (config, layer, its type) -> settings


def _no_extras(reader: Reader, index: int, layer_type: str) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The layers of a model type.

    Attributes:
        layer_types: where the config has none.
        window: keys that a sliding layer sees.
        rotates: which layers do.
        interleaved: whether the rotation pairs neighbouring features.
        bias: of q, k and v: a key, or what the model always does.
        out_bias: of the output.
        qk_norm: as in the modules.
        norm_offset: of the checkpoint's factors of these norms.
        extras: further settings of a layer.
        local_theta: version 4's key of the base of sliding layers, which it does not scale.
        full_slides: whether "full_attention" is windowed too.
        defaults: what the config may leave out.
        aliases: other names of keys.
        ignored: keys that look as if they decided, and do not.
        notes: what is in dispute.
    """

    layer_types: LayerTypes = types.uniform
    window: Callable[[Reader], int | None] = types.window_of
    rotates: Rotates = rotation.always
    interleaved: bool = False
    bias: Bias = "attention_bias"
    out_bias: Bias = "attention_bias"
    qk_norm: bool | str = False
    norm_offset: float = 0.0
    extras: Extras = _no_extras
    local_theta: str | None = None
    full_slides: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    notes: str = ""
