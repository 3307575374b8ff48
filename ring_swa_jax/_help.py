"""What `help` and `inspect` show of the layers."""

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)


def shows_arguments(layer: Class) -> Class:
    """Gives a class the signature of its ``__init__``, which the metaclass of nnx hides."""
    parameters = list(inspect.signature(vars(layer)["__init__"]).parameters.values())
    layer.__signature__ = inspect.Signature(parameters[1:])  # type: ignore[attr-defined]
    return layer


def shows_fields_as(other: Any) -> Callable[[Class], Class]:
    """Describes the fields of a class by what another docstring says of arguments of their names.

    The section "Args" goes before "Raises".
    """

    def decorate(layer: Class) -> Class:
        if layer.__doc__ is None or other.__doc__ is None:  # python -OO
            return layer
        own, described = inspect.cleandoc(layer.__doc__), inspect.cleandoc(other.__doc__)
        section = described.split("\nArgs:\n")[1].split("\n\n")[0]
        items = re.split(r"(?m)^(?= {4}\w+:)", section)
        known = [item for item in items if item.split(":")[0].strip() in layer.__annotations__]
        before, after = own.split("Raises:\n")
        layer.__doc__ = f"{before}Args:\n{''.join(known).rstrip()}\n\nRaises:\n{after}"
        return layer

    return decorate
