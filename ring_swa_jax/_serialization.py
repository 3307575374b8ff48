"""Caches in `flax.serialization`: their arrays, by name.

Both Flax modules import this; the package itself does without Flax.
"""

import dataclasses
from typing import Any

import flax.serialization
import jax.numpy as jnp

from ring_swa_jax._cache import Cache

_STATIC = {"window_size", "relative_positions"}
_ARRAYS = [field.name for field in dataclasses.fields(Cache) if field.name not in _STATIC]


def _to_state_dict(cache: Cache) -> dict[str, Any]:
    return {name: getattr(cache, name) for name in _ARRAYS}


def _from_state_dict(cache: Cache, state: dict[str, Any]) -> Cache:
    # What was read from bytes are NumPy arrays.
    arrays: dict[str, Any] = {name: jnp.asarray(state[name]) for name in _ARRAYS}
    return dataclasses.replace(cache, **arrays)


flax.serialization.register_serialization_state(Cache, _to_state_dict, _from_state_dict)
