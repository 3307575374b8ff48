"""One version, wherever it is asked for."""

import importlib.metadata
import re
from pathlib import Path

import ring_swa_jax

ROOT = Path(__file__).parents[2]


def test_the_installed_package_has_the_version_of_the_module():
    assert importlib.metadata.version("ring-swa-jax") == ring_swa_jax.__version__


def test_the_citation_has_it_too():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == ring_swa_jax.__version__
