"""Which layers of a model rotate queries and keys."""

from collections.abc import Callable

from ring_swa_jax._hugging_face import layer_types as types
from ring_swa_jax._hugging_face.reader import Reader

Rotates = Callable[[Reader, int, str], bool]  # (config, layer, its type)


def always(reader: Reader, index: int, layer_type: str) -> bool:
    """All layers."""
    return True


def where_sliding(reader: Reader, index: int, layer_type: str) -> bool:
    """Layers with a window."""
    return layer_type == types.SLIDING


def where_sliding_if_any(reader: Reader, index: int, layer_type: str) -> bool:
    """Layers with a window, or all where no layer has one."""
    return layer_type == types.SLIDING or types.window_of(reader) is None


def where_sliding_or_dense(reader: Reader, index: int, layer_type: str) -> bool:
    """Layers with a window and, in Cohere 2 with experts, full ones of the dense prefix."""
    mlp = reader.get("mlp_layer_types")
    first_sparse = reader.get("first_k_dense_replace", 0)
    dense = mlp[index] == "dense" if mlp else index < first_sparse
    prefix_is_full = reader.get("prefix_dense_sliding_window_pattern", 1) == 1
    return layer_type == types.SLIDING or (dense and prefix_is_full)


def by_no_rope_layers(reader: Reader, index: int, layer_type: str) -> bool:
    """Layers to which ``no_rope_layers`` gives 1."""
    return types.no_rope_layers(reader)[index]


def by_layer_rope_theta(otherwise: Rotates) -> Rotates:
    """Layers to which ``layer_rope_theta`` gives a base; without that key, ``otherwise``."""

    def rotates(reader: Reader, index: int, layer_type: str) -> bool:
        thetas = reader.get("layer_rope_theta")
        return bool(thetas[index]) if thetas else otherwise(reader, index, layer_type)

    return rotates
