"""The attention layers of a whole model, as data."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """How a checkpoint's tensors differ from the parameters that they become.

    Attributes:
        norm_offset: added to the factors of the norms of q and k, 1 for Gemma 2 and 3.
        value_factor: multiplies the values' kernel and bias.
    """

    norm_offset: float = 0.0
    value_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelLayers:
    """The attention layers of a model.

    Attributes:
        source: where the numbers are from.
        layers: the kind of every layer. A kind that is not in ``kinds`` has no attention: a
            convolution or a recurrence.
        kinds: settings of each kind, keyword arguments of
            `ring_swa_jax.nnx.RingSlidingWindowAttention`.
        notes: what the settings do not say, or what other programs do otherwise.
        kv_from: for every layer with ``kv_shared`` the index of the earlier layer whose keys and
            values it takes, None for the others.
        checkpoint: what `weights_from_hugging_face` has to know besides.
    """

    source: str
    layers: tuple[str, ...]
    kinds: dict[str, dict[str, Any]]
    notes: str = ""
    kv_from: tuple[int | None, ...] = ()
    checkpoint: Checkpoint = Checkpoint()

    def __post_init__(self):
        if not self.kv_from:
            object.__setattr__(self, "kv_from", (None,) * len(self.layers))

    def __hash__(self) -> int:
        kinds = frozenset((kind, frozenset(own.items())) for kind, own in self.kinds.items())
        return hash((self.source, self.layers, kinds, self.notes, self.kv_from, self.checkpoint))

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return len(self.layers)
