"""The same layers through this library."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ring_swa_jax as rsj
import ring_swa_jax.linen
from tests.ring_swa_jax.hugging_face.cases import SEGMENT_IDS, inputs, weights_of

Shapes = Mapping[int, Mapping[str, tuple[int, ...]]]


class Layer:
    """A layer of a model, with the earlier one whose keys and values it takes.

    Args:
        model_layers: of the model.
        index: of the layer.
        shapes: of the tensors of this layer and of that earlier one.
        settings: more of them, for the modules.
    """

    def __init__(self, model_layers: rsj.ModelLayers, index: int, shapes: Shapes, **settings: Any):
        self.index = index
        self.source = model_layers.kv_from[index]
        self.indices = [index] if self.source is None else [self.source, index]
        self.parameters = [
            rsj.weights_from_hugging_face(weights_of(shapes[i], i), model_layers, i)
            for i in self.indices
        ]
        self.modules = [
            rsj.linen.RingSlidingWindowAttention(
                **(dict(model_layers.kinds[model_layers.layers[i]]) | settings)
            )
            for i in self.indices
        ]
        self.features = self.modules[0].in_features

    def __call__(self, parameters, x, segment_ids=None):
        """The layer's output."""
        kv = None
        for module, own in zip(self.modules[:-1], parameters[:-1], strict=True):
            kv = module.apply({"params": own}, x, segment_ids=segment_ids, method="keys_values")
        variables = {"params": parameters[-1]}
        return self.modules[-1].apply(variables, x, segment_ids=segment_ids, shared_kv=kv)

    def out_and_gradient(self, segment_ids=SEGMENT_IDS, jit=jax.jit):
        """(output, gradient of x) of both rows."""
        x, cotangent = inputs(self.features)

        @jit
        def run(parameters, x, cotangent, segment_ids):
            out, pull = jax.vjp(lambda x: self(parameters, x, segment_ids), x)
            return out, pull(cotangent)[0]

        return jax.device_get(run(self.parameters, x, cotangent, segment_ids))

    def decoded(self, jit=jax.jit):
        """The output for the first row, token by token."""
        x = inputs(self.features)[0][:1]

        @jit
        def run(parameters, x):
            cache = self.modules[0].init_cache(1, max_length=x.shape[1])

            def step(cache, token):
                kv, before, first = None, cache, {"params": parameters[0]}
                if len(self.modules) > 1:
                    kv = self.modules[0].apply(first, token, cache=cache, method="keys_values")
                    _, cache = self.modules[0].apply(first, token, cache, method="decode")
                own = {"params": parameters[-1]}
                y, after = self.modules[-1].apply(own, token, before, shared_kv=kv, method="decode")
                return cache if len(self.modules) > 1 else after, y

            return jax.lax.scan(step, cache, jnp.swapaxes(x, 0, 1)[:, :, None])[1][:, :, 0]

        return np.swapaxes(jax.device_get(run(self.parameters, x)), 0, 1)


def relative_difference(got: np.ndarray, want: np.ndarray) -> float:
    """Of the norms."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
