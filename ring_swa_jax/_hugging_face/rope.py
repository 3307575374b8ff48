"""Rotary settings from a config.json of transformers 4 or 5."""

import math
from collections.abc import Mapping
from typing import Any

from ring_swa_jax._hugging_face.reader import Reader
from ring_swa_jax._rope import Rope
from ring_swa_jax._rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
)

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# Keys of transformers 5's form, and further keys in that place that change nothing here.
_FORM = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ELSEWHERE = {"max_position_embeddings", "llama_4_scaling_beta", "mrope_section"}


def rope_of(
    reader: Reader,
    parameters: Mapping[str, Any],
    head_dim: int,
    *,
    max_length: int | None,
    interleaved: bool,
) -> Rope:
    """Rotary settings from those of `rope_parameters`.

    Args:
        reader: the config.
        parameters: the rotary settings of a layer, as in version 5.
        head_dim: H.
        max_length: the longest sequence that the layer will see; it selects LongRoPE's factors.
        interleaved: whether the model pairs neighbouring features.

    Raises:
        NotImplementedError: an unknown kind of scaling, or an unknown key of a scaling.
    """
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    part = parameters.get("partial_rotary_factor") or 1.0
    used: set[str] = set()
    if kind in ("default", "mrope"):  # for text the three positions of mrope are one
        scaling = None
    elif kind in _SCALINGS:
        scaling, used = _SCALINGS[kind](reader, parameters, max_length)
    else:
        raise NotImplementedError(
            f"rope_type={kind!r} of model_type={reader.model_type!r}: there are "
            f"{', '.join(('default', *_SCALINGS))}"
        )
    left = {
        key: value
        for key, value in parameters.items()
        if key not in used | _FORM | _ELSEWHERE and value is not None
    }
    if left:
        raise NotImplementedError(
            f"not understood in the rotary settings of model_type={reader.model_type!r} with "
            f"rope_type={kind!r}: {left}"
        )
    turned = head_dim if kind == "proportional" else int(head_dim * part)
    return Rope(
        float(parameters["rope_theta"]),
        rotary_dim=None if turned == head_dim else turned,
        scaling=scaling,
        interleaved=interleaved,
    )


def rope_parameters(
    reader: Reader, layer_type: str, local_theta: str | None = None
) -> Mapping[str, Any] | None:
    """The rotary settings of a layer type in the form of version 5; None: it does not rotate.

    Args:
        reader: the config.
        layer_type: as in ``layer_types``.
        local_theta: version 4's key for the base of sliding layers, whose rotation is not scaled.
    """
    reader.ignore("original_max_position_embeddings")  # of scalings, which read it
    old = reader.says("rope_theta") or reader.says("rope_scaling")
    whole = {} if old and not reader.says("rope_parameters") else reader.get("rope_parameters", {})
    common = {
        "rope_theta": reader.get("rope_theta"),
        "partial_rotary_factor": reader.get("partial_rotary_factor"),
    }
    old_scaling = reader.get("rope_scaling", {})
    if any(key in whole for key in _LAYER_TYPES):
        own = whole.get(layer_type)
        if own is None:
            return None
    elif whole:
        own = whole
    else:
        own = dict(old_scaling)
        if local_theta is not None and layer_type == "sliding_attention":
            own = {}
            if reader.get(local_theta) is not None:
                own["rope_theta"] = reader.get(local_theta)
    own = {key: value for key, value in common.items() if value is not None} | dict(own)
    own.setdefault("rope_theta", 10_000.0)
    return own


def _original_length(reader: Reader, parameters: Mapping[str, Any]) -> int:
    """The context of the original training."""
    own = reader.get("original_max_position_embeddings")
    own = own or parameters.get("original_max_position_embeddings")
    return int(own or reader.need("max_position_embeddings"))


def _linear(reader, parameters, max_length) -> tuple[RopeScaling, set[str]]:
    return LinearScaling(float(parameters["factor"])), {"factor"}


def _yarn(reader, parameters, max_length) -> tuple[RopeScaling, set[str]]:
    original = _original_length(reader, parameters)
    factor = parameters.get("factor") or reader.need("max_position_embeddings") / original
    scaling = YarnScaling(
        float(factor),
        original,
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        attention_factor=parameters.get("attention_factor"),
        truncate=bool(parameters.get("truncate", True)),
        mscale=parameters.get("mscale"),
        mscale_all_dim=parameters.get("mscale_all_dim"),
    )
    return scaling, {
        "factor", "beta_fast", "beta_slow", "attention_factor", "truncate", "mscale",
        "mscale_all_dim", "original_max_position_embeddings",
    }  # fmt: skip


def _llama3(reader, parameters, max_length) -> tuple[RopeScaling, set[str]]:
    scaling = Llama3Scaling(
        float(parameters["factor"]),
        _original_length(reader, parameters),
        float(parameters["low_freq_factor"]),
        float(parameters["high_freq_factor"]),
    )
    return scaling, {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    }  # fmt: skip


def _long(reader, parameters, max_length) -> tuple[RopeScaling, set[str]]:
    original = _original_length(reader, parameters)
    longest = reader.need("max_position_embeddings")
    form = "long" if (max_length or longest) > original else "short"
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = parameters.get(f"{form}_mscale")
    if attention_factor is None:
        factor = parameters.get("factor") or longest / original
        grown = math.log(factor) / math.log(original) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + grown)
    scaling = LongRopeScaling(
        tuple(map(float, parameters[f"{form}_factor"])), float(attention_factor)
    )
    return scaling, {
        "factor", "long_factor", "short_factor", "long_mscale", "short_mscale",
        "attention_factor", "original_max_position_embeddings",
    }  # fmt: skip


def _proportional(reader, parameters, max_length) -> tuple[RopeScaling, set[str]]:
    part = parameters.get("partial_rotary_factor") or 1.0
    return ProportionalScaling(float(part), float(parameters.get("factor") or 1.0)), {"factor"}


_SCALINGS = {
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _long,
    "su": _long,  # Phi-3's first name of it
    "proportional": _proportional,
}
