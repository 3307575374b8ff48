"""Inputs and weights of the comparison with transformers, drawn by NumPy."""

import math
from collections.abc import Mapping

import numpy as np

LENGTH = 16
DOCUMENTS = ([16], [5, 11])  # of two rows
SEGMENT_IDS = np.stack([np.repeat(np.arange(len(row)), row) for row in DOCUMENTS])


def inputs(features: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, cotangent of the output), [B, S, E]."""
    rng = np.random.default_rng(features)
    draw = rng.standard_normal((2, len(DOCUMENTS), LENGTH, features)).astype(np.float32)
    return draw[0], draw[1]


def weights_of(shapes: Mapping[str, tuple[int, ...]], layer: int) -> dict[str, np.ndarray]:
    """Weights of a layer; none is a silent zero or one."""
    rng = np.random.default_rng(layer)
    return {
        name: _scaled(rng.standard_normal(shapes[name]), name).astype(np.float32)
        for name in sorted(shapes)
    }


def _scaled(weight: np.ndarray, name: str) -> np.ndarray:
    if weight.ndim == 2:
        return weight / math.sqrt(weight.shape[1])
    return weight / 2 + (1 if "norm" in name else 0)
