"""A record of what a model type's layers do beyond what its config.json says."""

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
        layer_types: the rule for the layers' types where the config does not list them.
        window: the number of keys that a sliding layer sees.
        rotates: which layers rotate queries and keys.
        interleaved: whether the rotation pairs neighbouring features.
        bias: whether q, k and v have a bias: the key that says so, or a constant.
        out_bias: the same for the output projection.
        qk_norm: as in the modules.
        norm_offset: added to the checkpoint's factors of the norms of q and k.
        extras: further settings of a layer.
        local_theta: transformers 4's key for the rotary base of sliding layers, whose rotation
            is not scaled.
        full_slides: whether layers of type "full_attention" have the window too.
        defaults: values of keys that the config may leave out.
        aliases: other names of keys.
        ignored: keys that seem to concern the attention but do not.
        notes: known disagreements about the model.
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
