"""Signatures as they stand in the source, for the API reference.

What Python makes of them when it runs, the names of JAX's private modules and the addresses of
functions, is not for readers.
"""

import ast
import inspect
import textwrap
from typing import Any


def signature(app: Any, what: str, name: str, obj: Any, *rest: Any) -> tuple[str, str] | None:
    """Handler of autodoc's event "autodoc-process-signature": arguments and result."""
    del app, name, rest
    if what not in ("class", "function", "method"):
        return None
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(obj))).body
    if isinstance(node, ast.ClassDef):
        return f"({_constructor(node)})", ""
    assert isinstance(node, ast.FunctionDef)
    if what == "method":
        del node.args.args[0]
    result = ast.unparse(node.returns) if node.returns else ""
    return f"({ast.unparse(node.args)})", result.strip("'")


def _constructor(node: ast.ClassDef) -> str:
    """Arguments of the class's own __init__, or of the one that dataclass makes."""
    fields = []
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            del statement.args.args[0]
            return ast.unparse(statement.args)
        if isinstance(statement, ast.AnnAssign):
            field = ast.unparse(statement)
            if "dataclasses.field(" in field:
                field = field.split(" = ")[0]
            fields.append("*" if "KW_ONLY" in field else field)
    return ", ".join(fields)
