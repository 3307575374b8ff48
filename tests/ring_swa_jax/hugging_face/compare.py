"""Compares all small models with transformers now. Needs torch and transformers.

PYTHONPATH=. python -m tests.ring_swa_jax.hugging_face.compare [name ...]
"""

import sys
import warnings

warnings.filterwarnings("ignore")

import ring_swa_jax as rsj  # noqa: E402
from tests.ring_swa_jax.hugging_face.cases import inputs  # noqa: E402, F401
from tests.ring_swa_jax.hugging_face.ours import Layer, relative_difference  # noqa: E402
from tests.ring_swa_jax.hugging_face.small_models import SMALL  # noqa: E402
from tests.ring_swa_jax.hugging_face.torch_layers import config_and_results  # noqa: E402


def differences(name: str) -> dict[int, tuple[float, float, float]]:
    """By layer: of the output, of the gradient, of the decoded first row."""
    small = SMALL[name]
    config, results = config_and_results(small)
    model_layers = rsj.settings_from_hugging_face(config, max_length=small.max_length)
    shapes = {i: result.shapes for i, result in results.items()}
    found = {}
    for i, result in results.items():
        layer = Layer(model_layers, i, shapes, seq_axis=None)
        out, gradient = layer.out_and_gradient()
        found[i] = (
            relative_difference(out, result.out),
            relative_difference(gradient, result.gradient),
            relative_difference(layer.decoded(), result.out[:1]),
        )
    return found


if __name__ == "__main__":
    import traceback

    for name in sys.argv[1:] or SMALL:
        try:
            print(
                name,
                {i: tuple(f"{d:.1e}" for d in ds) for i, ds in differences(name).items()},
                flush=True,
            )
        except Exception as error:
            print(name, "FAILED", type(error).__name__, str(error)[:300], flush=True)
            if len(sys.argv) == 2:
                traceback.print_exc()
