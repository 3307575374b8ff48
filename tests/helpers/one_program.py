"""A fixture for tests of many layers, in which compiling the attention is most of the time."""

import functools
import inspect

import jax
import pytest

from ring_swa_jax import _layer, ring_attention

_ARRAYS = {"q", "k", "v", "segment_ids", "sink_logits"}


@functools.cache
def _jitted():
    static = set(inspect.signature(ring_attention).parameters) - _ARRAYS
    return jax.jit(ring_attention, static_argnames=tuple(static))


@pytest.fixture
def one_program_for_all(monkeypatch):
    """Layers run op by op, and their attention as one program for all of the same settings."""
    monkeypatch.setattr(_layer, "ring_attention", _jitted())
