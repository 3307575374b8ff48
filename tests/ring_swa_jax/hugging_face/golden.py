"""Results of transformers, stored: each small model's config.json, tensors' shapes and layers.

With torch and transformers ``python -m tests.ring_swa_jax.hugging_face.golden`` computes them anew.
"""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

_HERE = pathlib.Path(__file__).parent
_ARRAYS, _RECORDS = _HERE / "golden.npz", _HERE / "golden.json"


class Golden(NamedTuple):
    """One small model.

    Attributes:
        config: config.json, as transformers writes it.
        max_length: for LongRoPE.
        shapes: of each layer's tensors.
        out: by layer, [B, S, E].
        gradient: of x, by layer.
    """

    config: dict[str, Any]
    max_length: int | None
    shapes: dict[int, dict[str, tuple[int, ...]]]
    out: dict[int, np.ndarray]
    gradient: dict[int, np.ndarray]


@functools.cache
def records() -> dict[str, Any]:
    """What the JSON file holds: versions, and by model all but the arrays."""
    return json.loads(_RECORDS.read_text())


@functools.cache
def _arrays():
    return dict(np.load(_ARRAYS))


def names() -> list[str]:
    """Of the models."""
    return list(records()["models"])


def golden(name: str) -> Golden:
    """One model's results."""
    record = records()["models"][name]
    shapes = {
        int(i): {tensor: tuple(shape) for tensor, shape in layer.items()}
        for i, layer in record["shapes"].items()
    }
    out, gradient = (
        {i: _arrays()[f"{name}/{i}/{what}"] for i in shapes} for what in ("out", "gradient")
    )
    return Golden(record["config"], record["max_length"], shapes, out, gradient)


def main() -> None:
    """Writes both files."""
    import torch
    import transformers

    from tests.ring_swa_jax.hugging_face.small_models import SMALL
    from tests.ring_swa_jax.hugging_face.torch_layers import config_and_results

    models: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, small in SMALL.items():
        config, results = config_and_results(small)
        shapes = {i: result.shapes for i, result in results.items()}
        models[name] = {
            "folder": small.folder,
            "config": config,
            "max_length": small.max_length,
            "shapes": shapes,
        }
        for i, result in results.items():
            arrays[f"{name}/{i}/out"] = result.out
            arrays[f"{name}/{i}/gradient"] = result.gradient
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    _RECORDS.write_text(json.dumps({"versions": versions, "models": models}) + "\n")
    np.savez_compressed(_ARRAYS, **arrays)


if __name__ == "__main__":
    main()
