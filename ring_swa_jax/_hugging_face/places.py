"""Where the parameters of an attention module lie in a checkpoint's tensors."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ring_swa_jax._model_layers import Checkpoint, ModelLayers

# Names that different checkpoints give to the same tensor.
_NAMES = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "fused": ("qkv_proj", "Wqkv"),
    "out": ("o_proj", "Wo", "out_proj"),
    "gate": ("gate_proj", "g_proj"),
    "query_norm": ("q_norm", "q_layernorm", "query_layernorm"),
    "key_norm": ("k_norm", "k_layernorm", "key_layernorm"),
}
_SINKS = ("sinks", "attention_sink_bias")


class Tensors:
    """The tensors of a layer; records which were taken and checks their shapes."""

    def __init__(self, tensors: Mapping[str, np.ndarray], where: str):
        self._tensors, self._where = tensors, where
        self._taken: set[str] = set()

    def has(self, names: tuple[str, ...]) -> bool:
        """Whether one of the names is there."""
        return any(name in self._tensors for name in names)

    def take(self, names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
        """The name among ``names`` that is there, and its tensor with its shape checked."""
        name = next((name for name in names if name in self._tensors), None)
        if name is None:
            raise ValueError(
                f"{self._where}: none of {names} is there, which should have the shape {shape}; "
                f"there are {sorted(self._tensors)}"
            )
        tensor = np.asarray(self._tensors[name])
        if tensor.shape != shape:
            raise ValueError(
                f"{self._where}: {name!r} should have the shape {shape}, got {tensor.shape}"
            )
        self._taken.add(name)
        return name, tensor

    def check_all_taken(self) -> None:
        """Checks that all tensors were taken: the settings have no parameter for the rest."""
        left = {
            name: np.shape(tensor)
            for name, tensor in self._tensors.items()
            if name not in self._taken
        }
        if left:
            raise ValueError(f"{self._where}: the settings have no place for {left}")


class Place(NamedTuple):
    """Where a parameter lies in a checkpoint: in some rows of a tensor.

    Attributes:
        path: of the parameter, such as ("query", "kernel").
        names: that checkpoints give to the tensor.
        shape: of the tensor.
        of_tensor: the dimensions of these rows, as einops writes them.
        of_parameter: the same dimensions in the parameter.
        sizes: of dimensions that einops cannot infer.
        rows: of the tensor, where several parameters share it.
        factor: the parameter is ``rows * factor + offset``.
        offset: see ``factor``.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    of_tensor: str
    of_parameter: str
    sizes: Mapping[str, int]
    rows: slice = slice(None)
    factor: float = 1.0
    offset: float = 0.0


def places(tensors: Tensors, model_layers: ModelLayers, layer: int) -> Iterator[Place]:
    """The place of every parameter of a layer; ``tensors`` tell whether projections are fused."""
    settings = model_layers.kinds[model_layers.layers[layer]]
    checkpoint = model_layers.checkpoint
    features, num_heads, head_dim = (
        settings[name] for name in ("in_features", "num_heads", "head_dim")
    )
    value_dim = settings.get("value_dim", head_dim)
    yield from _inputs(tensors, settings, checkpoint)
    gate = settings.get("output_gate")
    if gate is not None:
        gate_dim = 1 if gate == "headwise" else value_dim
        shape = (num_heads * gate_dim, features)
        yield _projection("gate", _named("gate", "weight"), shape, num_heads)
    shape = (features, num_heads * value_dim)
    sizes = {"n": num_heads}
    yield Place(("out", "kernel"), _named("out", "weight"), shape, "e (n h)", "n h e", sizes)
    if settings.get("use_out_bias", settings["use_bias"]):
        yield Place(("out", "bias"), _named("out", "bias"), (features,), "e", "e", {})
    yield from _norms(settings, checkpoint)
    if settings.get("learned_sinks"):
        yield Place(("sink_logits",), _SINKS, (num_heads,), "n", "n", {})


def _inputs(
    tensors: Tensors, settings: Mapping[str, Any], checkpoint: Checkpoint
) -> Iterator[Place]:
    """The projections of x to queries, keys and values, which one tensor may stack."""
    features, head_dim = settings["in_features"], settings["head_dim"]
    num_kv_heads = settings["num_kv_heads"]
    heads = {"query": (settings["num_heads"], head_dim)}
    if not settings.get("kv_shared"):
        heads["key"] = (num_kv_heads, head_dim)
        if not settings.get("key_as_value"):
            heads["value"] = (num_kv_heads, settings.get("value_dim", head_dim))
    fused = tensors.has(_named("fused", "weight"))
    all_rows = sum(map(math.prod, heads.values()))
    begin = 0
    for name, (n, h) in heads.items():
        rows = slice(begin, begin + n * h) if fused else slice(None)
        begin += n * h
        place = _projection(
            name,
            _named("fused" if fused else name, "weight"),
            (all_rows if fused else n * h, features),
            n,
        )._replace(rows=rows, factor=checkpoint.value_factor if name == "value" else 1.0)
        yield place
        if settings["use_bias"]:
            yield place._replace(
                path=(name, "bias"),
                names=_named("fused" if fused else name, "bias"),
                shape=place.shape[:1],
                of_tensor="(n h)",
                of_parameter="n h",
            )


def _projection(name: str, names: tuple[str, ...], shape: tuple[int, int], n: int) -> Place:
    return Place((name, "kernel"), names, shape, "(n h) e", "e n h", {"n": n})


def _norms(settings: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[Place]:
    """Factors of the norms of q and k, which span one head or all heads."""
    if not settings.get("qk_norm") or not settings.get("qk_norm_scale", True):
        return
    heads = {"query_norm": settings["num_heads"], "key_norm": settings["num_kv_heads"]}
    if settings.get("kv_shared"):
        del heads["key_norm"]
    head_dim, offset = settings["head_dim"], checkpoint.norm_offset
    for name, n in heads.items():
        place = Place((name,), _named(name, "weight"), (head_dim,), "h", "h", {}, offset=offset)
        if settings["qk_norm"] == "all_heads":
            place = place._replace(
                shape=(n * head_dim,), of_tensor="(n h)", of_parameter="n h", sizes={"n": n}
            )
        yield place


def _named(part: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in _NAMES[part])
