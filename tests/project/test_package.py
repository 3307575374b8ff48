"""What setup.py makes of the README, what it says of models, and what the package needs."""

import importlib.util
import re
import subprocess
import sys

import ring_swa_jax
from notebooks.run import NOTEBOOKS, read
from tests.helpers.processes import ROOT


def load_setup():
    spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_links_on_the_index_do_not_depend_on_the_repository_being_there():
    page = setup.absolute(README, "https://example.org/owner/name")
    targets = LINK.findall(page)
    assert len(targets) == len(LINK.findall(README))
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert "](https://example.org/owner/name/raw/HEAD/docs/halo.png)" in page
    assert "](https://example.org/owner/name/blob/HEAD/docs/gpus.md)" in page


def test_without_an_address_links_are_text():
    page = setup.absolute(README, "")
    assert all("://" in target or target.startswith("#") for target in LINK.findall(page))
    assert "![" not in page
    assert setup.absolute("see [a page](docs/a.md#b), ![p](p.png)", "") == "see a page, "


def test_windows_of_the_readme_are_those_of_the_settings():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\d+) \|$", README, flags=re.MULTILINE)
    shown = {name: int(window) for names, window in rows for name in re.findall(r"\w+", names)}
    assert shown == {
        name: model.kinds["local"]["window_size"] for name, model in ring_swa_jax.models.items()
    }


def test_one_setting_has_the_address():
    repository = setup.read_repository()
    assert set(setup.project_urls(repository).values()) >= ({repository} if repository else set())
    for path in NOTEBOOKS:
        code = "".join("".join(cell["source"]) for cell in read(path)["cells"])
        assert re.findall(r'^REPOSITORY = "(.*?)"', code, re.MULTILINE) == [repository]


def test_without_flax_all_but_the_modules_is_there():
    code = """
import sys
sys.modules["flax"] = None  # importing it fails
import ring_swa_jax
try:
    import ring_swa_jax.nnx
except ModuleNotFoundError as error:
    print(error.name)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("flax")
