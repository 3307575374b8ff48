"""Writes docs/api.md, the API reference, from signatures and docstrings in the source.

A page of Markdown can be read on a code host too. `python docs/make_api.py`
"""

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from _api_names import PAGE, SECTIONS, TEXTS  # noqa: E402
from _docstrings import to_markdown  # noqa: E402

API = ROOT / "docs" / "api.md"
WIDTH = 88


def find(name: str) -> Any:
    """The object of a name below `ring_swa_jax`."""
    *module, last = name.split(".")
    return getattr(importlib.import_module(".".join(["ring_swa_jax", *module])), last)


def members() -> list[tuple[str, Any]]:
    """(name, object) of all that is described, in the page's order."""
    found: list[tuple[str, Any]] = []
    for entries in SECTIONS.values():
        for entry in entries:
            name, methods = (entry, ()) if isinstance(entry, str) else entry
            owner = find(name)
            found.append((name, owner))
            found += [(f"{name}.{m}", inspect.getattr_static(owner, m)) for m in methods]
    return found


def anchor(name: str) -> str:
    """That of a heading, as code hosts and the site make it."""
    return re.sub(r"[^\w -]", "", name).lower()


def link(name: str, owner: str, documented: frozenset[str]) -> str:
    """A name in Markdown, a link where the page describes it."""
    short = name.removeprefix("ring_swa_jax.")
    for candidate in (short, f"{owner}.{short}", f"{owner.rpartition('.')[0]}.{short}"):
        if candidate in documented and candidate != owner:
            return f"[`{name}`](#{anchor(candidate)})"
    return f"`{name}`"


def arguments(node: ast.arguments) -> list[str]:
    """Each argument as it stands in the source, in order."""
    both = [*node.posonlyargs, *node.args]
    defaults: list[ast.expr | None] = [None] * (len(both) - len(node.defaults))
    found = [_argument(*pair) for pair in zip(both, [*defaults, *node.defaults], strict=True)]
    if node.vararg or node.kwonlyargs:
        found.append("*" + (ast.unparse(node.vararg) if node.vararg else ""))
    found += map(_argument, node.kwonlyargs, node.kw_defaults)
    return found + (["**" + ast.unparse(node.kwarg)] if node.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if argument.annotation else "="
    return ast.unparse(argument) + (equals + ast.unparse(default) if default else "")


def constructor(node: ast.ClassDef) -> list[str]:
    """Arguments of the class's own __init__, or of the one that dataclass makes."""
    fields = []
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return arguments(statement.args)[1:]
        if isinstance(statement, ast.AnnAssign):
            field = ast.unparse(statement)
            if "dataclasses.field(" in field:
                field = field.split(" = ")[0]
            fields.append("*" if "KW_ONLY" in field else field)
    return fields


def signature(name: str, owner: Any) -> str:
    """A call, one argument a line where it is long; nothing for what is not called."""
    if isinstance(owner, property) or not callable(owner):
        return ""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    result = ""
    if isinstance(node, ast.ClassDef):
        given = constructor(node)
    else:
        assert isinstance(node, ast.FunctionDef)
        given = arguments(node.args)[1 if node.args.args[:1] and _is_method(node) else 0 :]
        result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    call = f"{name.rpartition('.')[2]}({', '.join(given)}){result}"
    if len(call) > WIDTH:
        lines = "".join(f"    {each},\n" for each in given)
        call = f"{name.rpartition('.')[2]}(\n{lines}){result}"
    return call.replace("'", '"')


def _is_method(node: ast.FunctionDef) -> bool:
    return node.args.args[0].arg == "self"


def describe(name: str, owner: Any, documented: frozenset[str]) -> str:
    """Heading, signature and docstring of one name."""
    level = "####" if name.count(".") > name.startswith(("nnx.", "linen.")) else "###"
    text = f"{level} `{name}`\n\n"
    if call := signature(name, owner):
        text += f"<!-- not run: a signature -->\n```python\n{call}\n```\n\n"
    if name in TEXTS:
        return text + TEXTS[name] + "\n"
    docstring = owner.__doc__
    assert docstring, f"{name} has no docstring"
    here = functools.partial(link, owner=name, documented=documented)
    return text + to_markdown(docstring, here)


def page() -> str:
    """The whole page."""
    described = members()
    documented = frozenset(name for name, _ in described)
    texts = {name: describe(name, owner, documented) for name, owner in described}
    contents, parts = [], []
    for title, entries in SECTIONS.items():
        names = [entry if isinstance(entry, str) else entry[0] for entry in entries]
        links = ", ".join(f"[`{name}`](#{anchor(name)})" for name in names)
        contents.append(f"- {title}: {links}")
        parts.append(f"## {title}\n")
        parts += [text for name, text in texts.items() if _belongs(name, names)]
    return PAGE.format(contents="\n".join(contents)) + "\n" + "\n".join(parts)


def _belongs(name: str, names: list[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in names)


if __name__ == "__main__":
    API.write_text(page(), encoding="utf-8")
