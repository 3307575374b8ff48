"""Executes the notebooks, each in a clean kernel: `python notebooks/run.py [NAME ...]`.

Without --check it stores what the cells give; with it the files stay as they are, and must already
hold the outputs of a run from top to bottom. The kernel is the Python that runs this script, and it
takes `ring_swa_jax` from where that Python has it; where it has none, the first cell installs it.
"""

import argparse
import json
import pathlib
import re
import sys
import time
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELL_SECONDS = 300
MOST_BYTES = 600_000

# A notebook as in its file: https://nbformat.readthedocs.io/en/latest/format_description.html
Notebook = dict[str, Any]


def read(path: pathlib.Path) -> Notebook:
    """The notebook as it is stored."""
    return json.loads(path.read_text(encoding="utf-8"))


def execute(path: pathlib.Path) -> Notebook:
    """The notebook with the outputs of a clean kernel; its file is not touched.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    # Here, so that stored notebooks can be checked without these two.
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _as_shown(cell.outputs)
    return json.loads(nbformat.writes(notebook))


def _as_shown(outputs: list[Any]) -> list[Any]:
    """One stream where there are several in a row; of a progress bar what a terminal shows last."""
    shown: list[Any] = []
    for output in outputs:
        if output.output_type == "stream":
            if shown and shown[-1].get("name") == output.name:
                output.text = shown.pop().text + output.text
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
        shown.append(output)
    return shown


def problems(notebook: Notebook) -> list[str]:
    """What is wrong with the stored outputs."""
    found = []
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"not the outputs of one run from top to bottom: cells ran as {counts}")
    for cell in cells:
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                text = "".join(output.get("text", output.get("traceback", "")))
                found.append(f"cell {cell['execution_count']}: {text}")
    if not any("image/png" in output.get("data", ()) for x in cells for output in x["outputs"]):
        found.append("no picture")
    if (size := len(serialized(notebook))) > MOST_BYTES:
        found.append(f"{size} bytes, more than {MOST_BYTES}")
    return found


def serialized(notebook: Notebook) -> str:
    """The text of the notebook's file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Executes and stores or checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of file names (default: all notebooks)")
    parser.add_argument("--check", action="store_true", help="store nothing")
    args = parser.parse_args()
    wrong = False
    for path in NOTEBOOKS:
        if args.names and not any(name in path.name for name in args.names):
            continue
        start = time.perf_counter()
        executed = execute(path)
        seconds = time.perf_counter() - start
        stored = {"stored": read(path)} if args.check else {}
        if not args.check:
            path.write_text(serialized(executed), encoding="utf-8")
        found = {
            f"{name}: {problem}"
            for name, notebook in {**stored, "executed": executed}.items()
            for problem in problems(notebook)
        }
        wrong = wrong or bool(found)
        print(f"{path.name}: {seconds:.0f} s, {len(found)} problems", *sorted(found), sep="\n  ")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
