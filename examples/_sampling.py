"""Going on with a text by the rolling cache."""

import jax
import jax.numpy as jnp
import numpy as np

from _devices import on_one_device, one_device_mesh
from _model import Transformer, sample
from _tokenizer import BEGIN, BytePairs


def continue_text(
    model: Transformer, tokenizer: BytePairs, text: str, length: int, temperature: float, seed: int
) -> str:
    """Samples the `length` tokens after `text`, the beginning of a document, on one device."""
    prompt = jnp.asarray([BEGIN, *tokenizer.encode([text])[0]], jnp.int32)
    with jax.set_mesh(one_device_mesh()):
        tokens = sample(on_one_device(model), prompt, length, temperature, jax.random.key(seed))
    return tokenizer.decode(np.asarray(tokens))
