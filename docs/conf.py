"""Sphinx settings: `sphinx-build -W --keep-going -n docs docs/_build`."""

import pathlib
import shutil
import sys

from pygments.lexers.shell import BashLexer

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from _signatures import signature  # noqa: E402

project = "ring-swa-jax"
copyright = "the ring-swa-jax authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "ring-swa-jax"
html_copy_source = False
pygments_style = "tango"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
smartquotes = False

# In docstrings `name` is a link where the name is documented here.
default_role = "py:obj"
# Names of other libraries, and all types in annotations.
nitpick_ignore_regex = [("py:obj", r"(jax|flax|nnx)\..*"), ("py:class", ".*")]
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the signature has them


def setup(app):
    """Called by Sphinx."""
    app.add_lexer("console", BashLexer)  # commands without a prompt
    app.connect("autodoc-process-signature", signature)


# Sphinx reads what lies below its own folder only.
NOTEBOOKS = DOCS / "notebooks"
shutil.rmtree(NOTEBOOKS, ignore_errors=True)
for notebook in sorted((DOCS.parent / "notebooks").glob("*.ipynb")):
    NOTEBOOKS.mkdir(exist_ok=True)
    text = notebook.read_text(encoding="utf-8")
    (NOTEBOOKS / notebook.name).write_text(text.replace("](../docs/", "](../"), encoding="utf-8")
