"""Writes the table of docs/gpus.md from the compile gate's report, as that page says."""

import ast
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

PAGE = Path(__file__).with_name("gpus.md")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
HEAD = "| GPU | variant | backend | asked | available | spilled | seconds to compile |\n"
NAMES = {
    "a100": "A100", "b200": "B200", "h100": "H100", "l4": "L4", "rtx_pro_6000": "RTX PRO 6000",
    "t4": "T4",
}  # fmt: skip


def rows(report: Path) -> list[tuple[object, ...]]:
    """(GPU, variant, backend, asked, available, spilled, seconds) of each compiled program."""
    found = []
    for each in xml.parse(report).iter("property"):
        if each.get("name") == "gpu":
            target, variant, *rest = ast.literal_eval(each.get("value", ""))
            found.append((NAMES[target], variant.removesuffix(f"_{target}"), *rest))
    return sorted(found, key=str)


def table(found: list[tuple[object, ...]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |\n"
        for row in found
    ]
    return HEAD + "|---" * 7 + "|\n" + "".join(lines)


def main() -> None:
    """Replaces what stands between the two marks."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table(rows(Path(sys.argv[1]))) + END + after)


if __name__ == "__main__":
    main()
