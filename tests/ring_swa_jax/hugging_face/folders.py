"""Which of transformers' model folders agree with this library, as a table for the docs.

A folder counts when, with a window shorter than the row, outputs and gradients of its layers agree
to 1e-5 with the golden files of the transformers that is installed:
``python -m tests.ring_swa_jax.hugging_face.folders``.
"""

import pathlib
import re

import transformers

import ring_swa_jax as rsj
from ring_swa_jax._hugging_face.refused import refused
from tests.helpers.one_program import attention_as_one_program
from tests.ring_swa_jax.hugging_face.golden import golden, names, records
from tests.ring_swa_jax.hugging_face.ours import Layer, relative_difference

TOLERANCE = 1e-5
_MASKS = re.compile(r"sliding_window_(causal_)?mask|chunked_causal_mask")


def folders() -> list[str]:
    """Model folders of the installed transformers that build a sliding or a chunked mask."""
    models = pathlib.Path(transformers.__file__).parent / "models"
    paths = models.glob("*/modeling_*.py")
    return sorted({path.parent.name for path in paths if _MASKS.search(path.read_text())})


def has_window(name: str) -> bool:
    """Whether one of a small model's layers does not see the whole row."""
    model = golden(name)
    layers = rsj.settings_from_hugging_face(model.config, max_length=model.max_length)
    kinds = [layers.kinds[layers.layers[i]] for i in model.shapes]
    return any(kind["window_size"] or kind.get("attention_chunk_size") for kind in kinds)


def difference(name: str) -> float:
    """The greatest relative difference of the outputs and gradients of a small model's layers."""
    model = golden(name)
    layers = rsj.settings_from_hugging_face(model.config, max_length=model.max_length)
    found = []
    for i in model.shapes:
        out, gradient = Layer(layers, i, model.shapes, seq_axis=None).out_and_gradient(
            jit=lambda f: f
        )
        found += [relative_difference(out, model.out[i])]
        found += [relative_difference(gradient, model.gradient[i])]
    return max(found)


def main() -> None:
    """Prints the table."""
    stored = records()["versions"]["transformers"]
    if stored != transformers.__version__:
        raise SystemExit(
            f"the golden files are of transformers {stored}, {transformers.__version__} is "
            "installed: run python -m tests.ring_swa_jax.hugging_face.golden first"
        )
    folder_of = {name: records()["models"][name]["folder"] for name in names()}
    agreeing = 0
    for folder in (all_folders := folders()):
        models = [name for name in names() if folder_of[name] == folder]
        if models:
            if not any(map(has_window, models)):
                raise AssertionError(f"none of the layers of {models} has a window")
            worst = max(map(difference, models))
            agreeing += worst < TOLERANCE
            print(f"| {folder} | {worst:.0e} | |", flush=True)
        else:
            print(f"| {folder} | - | {refused.get(folder, 'not compared')} |", flush=True)
    print(f"{agreeing} of {len(all_folders)} folders of transformers {stored} agree")


if __name__ == "__main__":
    with attention_as_one_program():
        main()
