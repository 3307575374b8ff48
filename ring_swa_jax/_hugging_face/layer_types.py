"""The types of a model's layers where its config.json has no ``layer_types``.

Each rule is that of transformers for the model type.
"""

from collections.abc import Callable

from ring_swa_jax._hugging_face.reader import Reader

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LayerTypes = Callable[[Reader, int], list[str]]
# Older keys, which ``layer_types`` replaces.
INSTEAD_OF_LAYER_TYPES = (
    "_sliding_window_pattern",
    "first_k_dense_replace",
    "global_attn_every_n_layers",
    "hybrid_layer_pattern",
    "max_window_layers",
    "no_rope_layer_interval",
    "prefix_dense_sliding_window_pattern",
    "sliding_window_pattern",
)


def window_of(reader: Reader) -> int | None:
    """Keys that a query of a sliding layer sees, its own included; None: no window."""
    window = reader.get("sliding_window") or None
    return window if reader.get("use_sliding_window", True) else None


def window_of_mimo(reader: Reader) -> int | None:
    """One more than the model's own key, as in transformers."""
    own = reader.get("sliding_window_size")
    return window_of(reader) if own is None else own + 1


def window_of_modernbert_decoder(reader: Reader) -> int | None:
    """Half of ``local_attention``, which in the encoder counts keys on both sides."""
    reader.ignore("sliding_window")
    return reader.need("local_attention") // 2


def uniform(reader: Reader, num_layers: int) -> list[str]:
    """All layers slide where there is a window."""
    return [SLIDING if window_of(reader) else FULL] * num_layers


def full(reader: Reader, num_layers: int) -> list[str]:
    """No layer slides unless ``layer_types`` says so."""
    return [FULL] * num_layers


def every(period: int, *, at: int = -1, key: str = "sliding_window_pattern") -> LayerTypes:
    """Layer ``at`` of each period is full; the config's ``key`` may change the period."""

    def layer_types(reader: Reader, num_layers: int) -> list[str]:
        n = reader.get(key, period) if window_of(reader) else 1
        if isinstance(n, str):  # EXAONE's "LLLG"
            return [FULL if n[i % len(n)] == "G" else SLIDING for i in range(num_layers)]
        return [FULL if i % n == at % n else SLIDING for i in range(num_layers)]

    return layer_types


def every_from_the_last(period: int) -> LayerTypes:
    """Every ``period``-th layer is full, counted back from the last, which is full."""

    def layer_types(reader: Reader, num_layers: int) -> list[str]:
        return [FULL if (num_layers - 1 - i) % period == 0 else SLIDING for i in range(num_layers)]

    return layer_types


def upper(reader: Reader, num_layers: int) -> list[str]:
    """Layers slide from ``max_window_layers`` on."""
    first = reader.get("max_window_layers", num_layers)
    slides = window_of(reader) is not None
    return [SLIDING if slides and i >= first else FULL for i in range(num_layers)]


def lower_even(reader: Reader, num_layers: int) -> list[str]:
    """Layers with an even index below ``max_window_layers`` slide."""
    end = reader.get("max_window_layers", num_layers)
    slides = window_of(reader) is not None
    return [SLIDING if slides and i % 2 == 0 and i < end else FULL for i in range(num_layers)]


def mimo(reader: Reader, num_layers: int) -> list[str]:
    """The first and every sixth layer are full, unless the model's own key has a pattern."""
    slides = reader.get("hybrid_layer_pattern")
    if slides is not None:
        return [SLIDING if slide else FULL for slide in slides]
    return [FULL if i == 0 or i % 6 == 5 else SLIDING for i in range(num_layers)]


def flint(reader: Reader, num_layers: int) -> list[str]:
    """The first two layers, every fourth layer and the last layer are full."""
    return [
        FULL if i < 2 or i % 4 == 1 or i == num_layers - 1 else SLIDING for i in range(num_layers)
    ]


def cycle(*types: str, key: str | None = None) -> LayerTypes:
    """The given types in a cycle; the config's ``key`` may give other types."""

    def layer_types(reader: Reader, num_layers: int) -> list[str]:
        cycle = (reader.get(key) if key else None) or types
        return [cycle[i % len(cycle)] for i in range(num_layers)]

    return layer_types


def lfm3(reader: Reader, num_layers: int) -> list[str]:
    """Odd layers and the first are convolutions; the rest alternate full and sliding."""
    return [
        FULL if i % 4 == 2 else SLIDING if i % 4 == 0 and i > 0 else "conv"
        for i in range(num_layers)
    ]


def without_rope_slides(reader: Reader, num_layers: int) -> list[str]:
    """Layers that do not rotate slide, as in SmolLM3."""
    slides = window_of(reader) is not None
    return [SLIDING if slides and not rotates else FULL for rotates in no_rope_layers(reader)]


def with_rope_chunked(reader: Reader, num_layers: int) -> list[str]:
    """Layers that rotate attend in chunks, as in Llama 4."""
    chunked = reader.get("attention_chunk_size") is not None
    return [CHUNKED if chunked and rotates else FULL for rotates in no_rope_layers(reader)]


def no_rope_layers(reader: Reader) -> list[bool]:
    """Whether each layer rotates; a 1 in ``no_rope_layers`` means that the layer does."""
    given = reader.get("no_rope_layers")
    if given:
        return [bool(rotates) for rotates in given]
    interval = reader.get("no_rope_layer_interval", 4)
    return [(i + 1) % interval != 0 for i in range(reader.need("num_hidden_layers"))]


def after_a_dense_prefix(reader: Reader, num_layers: int) -> list[str]:
    """Cohere 2 with experts: the dense layers at the beginning have a separate pattern."""
    dense = reader.get("first_k_dense_replace", 0)
    own, rest = (
        reader.get(key, 4)
        for key in ("prefix_dense_sliding_window_pattern", "sliding_window_pattern")
    )
    return [FULL if (i + 1) % own == 0 else SLIDING for i in range(dense)] + [
        FULL if (i + 1) % rest == 0 else SLIDING for i in range(num_layers - dense)
    ]


def gemma4(reader: Reader, num_layers: int) -> list[str]:
    """Every sixth layer and the last layer are full."""
    layer_types = every(6)(reader, num_layers)
    return [*layer_types[:-1], FULL]
