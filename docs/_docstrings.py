"""Docstrings in Google's form, as Markdown."""

import inspect
import re
from collections.abc import Callable

LISTS = ("Args", "Attributes", "Raises")
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|References):$")


def to_markdown(docstring: str, link: Callable[[str], str]) -> str:
    """A docstring as Markdown.

    Args:
        docstring: as it stands in the source.
        link: what becomes of a name in single backticks.
    """
    title, blocks = "", [""]
    for line in inspect.cleandoc(docstring).splitlines():
        if found := SECTION.match(line):
            title = found[1]
            blocks.append(f"**{title}**\n\n")
        elif title in LISTS and (found := re.match(r" {4}(\w+): (.*)", line)):
            blocks[-1] += f"- ``{found[1]}``: {found[2]}\n"
        elif title in LISTS:
            blocks[-1] += f"  {line.strip()}\n" if line else ""
        else:
            blocks[-1] += line.strip() + "\n" if title else line + "\n"
    return "\n".join(inline(block.rstrip("\n"), link) + "\n" for block in blocks)


def inline(text: str, link: Callable[[str], str]) -> str:
    """Formulas, code and names as Markdown writes them."""
    text = re.sub(r":math:`([^`]+)`", lambda found: f"${found[1]}$", text)
    text = re.sub(r"\.\. math:: (.+?)(?=\n\n|\Z)", r"$$\n\1\n$$", text, flags=re.DOTALL)
    # Code in double backticks stays as it is; single ones are names.
    parts = re.split(r"(``[^`]+``|`[^`]+`|\$\$.+?\$\$|\$[^$]+\$)", text, flags=re.DOTALL)
    return "".join(_part(part, link) for part in parts)


def _part(part: str, link: Callable[[str], str]) -> str:
    if part.startswith("``"):
        return part[1:-1]
    if re.fullmatch(r"`[\w.]+`", part):
        return link(part.strip("`"))
    if part.startswith(("`", "$")):
        return part
    return re.sub(r"(?<=\d)\*\*(?=\d)", r"\*\*", part)  # a power, not bold
