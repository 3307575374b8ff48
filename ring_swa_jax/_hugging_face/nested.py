"""Nested dictionaries and their paths, without Flax, which the package need not have."""

from collections.abc import Mapping
from typing import Any

Path = tuple[str, ...]


def flatten(tree: Mapping[str, Any], above: Path = ()) -> dict[Path, Any]:
    """The leaves by their paths."""
    found: dict[Path, Any] = {}
    for name, value in tree.items():
        path = (*above, name)
        found |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return found


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for (*above, name), value in leaves.items():
        branch = tree
        for step in above:
            branch = branch.setdefault(step, {})
        branch[name] = value
    return tree
