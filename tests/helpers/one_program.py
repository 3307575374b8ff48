"""For tests of many layers, in which compiling the attention is most of the time."""

import contextlib
import functools
import inspect
from unittest import mock

import jax
import pytest

from ring_swa_jax import _layer, ring_attention

_ARRAYS = {"q", "k", "v", "segment_ids", "sink_logits"}


@functools.cache
def _jitted():
    static = set(inspect.signature(ring_attention).parameters) - _ARRAYS
    return jax.jit(ring_attention, static_argnames=tuple(static))


@contextlib.contextmanager
def attention_as_one_program():
    """Layers run op by op, and their attention as one program for all of the same settings."""
    with mock.patch.object(_layer, "ring_attention", _jitted()):
        yield


@pytest.fixture
def one_program_for_all():
    """The same as a fixture."""
    with attention_as_one_program():
        yield
