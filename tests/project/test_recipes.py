"""The recipes of docs/recipes.md: the page's lines, and where a client is installed its losses."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

from tests.helpers.processes import CPU, ROOT, start, succeed

RECIPES = ROOT / "examples" / "recipes"
NO_CLIENT = "needs a client's code: docs/recipes.md says where each one is looked for"


def folder_of(recipe):
    """Where the client's code is, or None."""
    if recipe.startswith("tunix"):
        found = importlib.util.find_spec("tunix")
        return found and Path(found.origin).parent
    variable, folder = {
        "flax_gemma": ("FLAX_EXAMPLES", "gemma"),
        "flax_lm1b": ("FLAX_EXAMPLES", "lm1b"),
        "maxtext_gemma2": ("MAXTEXT", "src/maxtext"),
    }[recipe]
    return Path(os.environ[variable], folder) if variable in os.environ else None


@pytest.mark.client
@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("flax_gemma", []),
        ("flax_lm1b", []),
        ("tunix_gemma3", []),
        ("maxtext_gemma2", []),
        ("maxtext_gemma2", ["--stages=2"]),
    ],
)
def test_our_attention_gives_the_losses_of_theirs(recipe, flags):
    folder = folder_of(recipe)
    if folder is None:
        pytest.skip(NO_CLIENT)
    (output,) = succeed([start(RECIPES / "compare.py", recipe, folder, *flags, **CPU)], timeout=900)
    assert len(re.findall(r"^ +[1-4]( +\d\.\d{7}){2}$", output, re.MULTILINE)) == 4


def test_the_page_shows_the_lines_that_the_scripts_apply():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```diff\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    applied = {path.read_text(encoding="utf-8") for path in RECIPES.glob("*.diff")}
    assert len(applied) >= 4
    assert set(shown) == applied
