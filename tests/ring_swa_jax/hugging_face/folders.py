"""Which of transformers' model folders agree with this library, as a table for the docs.

A folder counts when, with a window shorter than the row, outputs and gradients of its layers agree
to 1e-5. It needs torch and transformers: ``python -m tests.ring_swa_jax.hugging_face.folders``.
"""

import pathlib
import re
import warnings

import transformers
from transformers.utils import logging

import ring_swa_jax as rsj
from ring_swa_jax._hugging_face.families import refused
from tests.ring_swa_jax.hugging_face.ours import Layer, relative_difference
from tests.ring_swa_jax.hugging_face.small_models import SMALL
from tests.ring_swa_jax.hugging_face.torch_layers import config_and_results

TOLERANCE = 1e-5
_MASKS = re.compile(r"sliding_window_(causal_)?mask|chunked_causal_mask")


def folders() -> list[str]:
    """Model folders of the installed transformers that build a sliding or a chunked mask."""
    models = pathlib.Path(transformers.__file__).parent / "models"
    return sorted(
        {
            path.parent.name
            for path in models.glob("*/modeling_*.py")
            if _MASKS.search(path.read_text())
        }
    )


def difference(name: str) -> float:
    """The greatest relative difference of the outputs and gradients of a small model's layers."""
    small = SMALL[name]
    config, results = config_and_results(small)
    layers = rsj.settings_from_hugging_face(config, max_length=small.max_length)
    compared = [layers.kinds[layers.layers[i]] for i in results]
    if not any(kind["window_size"] or kind.get("attention_chunk_size") for kind in compared):
        raise AssertionError(f"{name}: none of the layers {tuple(results)} has a window")
    shapes = {i: result.shapes for i, result in results.items()}
    found = []
    for i, result in results.items():
        out, gradient = Layer(layers, i, shapes, seq_axis=None).out_and_gradient()
        found += [relative_difference(out, result.out)]
        found += [relative_difference(gradient, result.gradient)]
    return max(found)


def main() -> None:
    """Prints the table."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    rows, agreeing = [], 0
    for folder in folders():
        names = [name for name, small in SMALL.items() if small.folder == folder]
        if names:
            worst = max(map(difference, names))
            agreeing += worst < TOLERANCE
            rows.append(f"| {folder} | {worst:.0e} | |")
        else:
            rows.append(f"| {folder} | - | {refused.get(folder, 'not compared')} |")
        print(rows[-1], flush=True)
    print(f"{agreeing} of {len(rows)} folders of transformers {transformers.__version__} agree")


if __name__ == "__main__":
    main()
