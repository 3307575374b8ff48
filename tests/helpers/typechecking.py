"""The runtime check of signatures that tests/conftest.py lets jaxtyping put on every function."""

import dataclasses
import functools
import typing

import jax
import jaxtyping
import typeguard


def checked(function):
    """Checks arguments and result, and of dataclasses that are pytrees the fields.

    The `__init__` of a dataclass stays unchecked: JAX makes pytrees of axes, flags and much else.
    """
    # Local functions have no annotations as a rule and are made anew in every call.
    annotated = any(hint is not typing.Any for hint in function.__annotations__.values())
    if function.__name__ == "__init__" or not annotated:
        return function
    checked_function = typeguard.typechecked(function)

    @functools.wraps(function)
    def with_fields(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if dataclasses.is_dataclass(value) and not jax.tree_util.all_leaves([value]):
                _check_fields(value)
        return checked_function(*args, **kwargs)

    return with_fields


def _check_fields(value):
    """The fields' dimensions agree with one another, not with those of a function's arguments."""
    with jaxtyping.jaxtyped("context"):
        for name, hint in _hints(type(value)).items():
            typeguard.check_type(f"{type(value).__name__}.{name}", getattr(value, name), hint)


@functools.cache
def _hints(dataclass):
    return typing.get_type_hints(dataclass)
