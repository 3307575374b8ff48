"""The stored notebooks are whole: outputs of one clean run, and links to files that exist.

`python notebooks/run.py --check` executes them.
"""

import re

import pytest

from notebooks import run

NOTEBOOKS = pytest.mark.parametrize("path", run.NOTEBOOKS, ids=lambda path: path.stem)


def sources(path, kind):
    """The text of each cell of this kind."""
    return ["".join(x["source"]) for x in run.read(path)["cells"] if x["cell_type"] == kind]


@NOTEBOOKS
def test_stored_outputs(path):
    assert run.problems(run.read(path)) == []


def test_problems_are_found():
    stored = run.read(run.NOTEBOOKS[0])
    cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    cells[1]["execution_count"] = None
    cells[2]["outputs"] = [{"output_type": "stream", "name": "stderr", "text": ["a warning"]}]
    cells[3]["outputs"] = [{"output_type": "error", "traceback": ["an error"]}]
    found = "\n".join(run.problems(stored))
    assert "[1, None, 3, " in found
    assert "a warning" in found
    assert "an error" in found


def test_all_install_the_same_way():
    first = {sources(path, "code")[0] for path in run.NOTEBOOKS}
    assert len(run.NOTEBOOKS) == 4
    assert len(first) == 1


@NOTEBOOKS
def test_files_that_it_links_exist(path):
    links = re.findall(r"\]\(([^)#]+)\)", "\n".join(sources(path, "markdown")))
    assert links
    for link in links:
        assert (path.parent / link).exists(), link
