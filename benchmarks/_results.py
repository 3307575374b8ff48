"""Files of results: a JSON document whose "machine" says where it was measured.

A process that measures some rows of a benchmark writes a document of the same kind as the whole.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Document = dict[str, Any]


def path_in(folder: Path, benchmark: str, machine: dict[str, Any]) -> Path:
    """Where a benchmark's results of a machine lie in a folder."""
    count = f"{machine['devices']}x-" if "devices" in machine else ""
    device = "-".join(machine["device"].lower().split())
    return folder / f"{benchmark.replace('_', '-')}-{count}{device}.json"


def write(path: Path, document: Document) -> None:
    """Writes a document; who reads meanwhile sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(path)


def read(path: Path) -> Document:
    """The document of a JSON file."""
    return json.loads(path.read_text())


def merged(documents: list[Document]) -> Document:
    """One document with the entries of all, and all else as the first one says it."""
    whole: Document = {}
    for document in documents:
        for name, value in document.items():
            if isinstance(value, list):
                whole[name] = [*whole.get(name, []), *value]
            elif isinstance(value, dict) and name != "machine":
                whole[name] = {**whole.get(name, {}), **value}
            else:
                whole.setdefault(name, value)
    return whole
