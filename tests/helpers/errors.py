"""Expects errors with certain values in their messages."""

import contextlib

import pytest


@contextlib.contextmanager
def complains(error, *values):
    """Expects the error, with every value in its message."""
    with pytest.raises(error) as caught:
        yield
    for value in values:
        assert str(value) in str(caught.value), f"{value!r} not in: {caught.value}"
