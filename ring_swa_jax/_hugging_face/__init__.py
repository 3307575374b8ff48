"""Attention settings and weights from Hugging Face's config.json and checkpoints."""

from ring_swa_jax._hugging_face.settings import settings_from_hugging_face
from ring_swa_jax._hugging_face.weights import (
    weights_from_hugging_face,
    weights_to_hugging_face,
)

__all__ = [
    "settings_from_hugging_face",
    "weights_from_hugging_face",
    "weights_to_hugging_face",
]
