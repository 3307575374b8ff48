"""Sphinx settings: `sphinx-build -W --keep-going -n docs docs/_build`."""

import pathlib
import re
import shutil

from pygments.lexers.shell import BashLexer

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
project = "ring-swa-jax"
copyright = "the ring-swa-jax authors"
extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["_build"]
suppress_warnings = ["misc.highlighting_failure"]  # commands of IPython in notebooks

html_theme = "furo"
html_title = "ring-swa-jax"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_style = "tango"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
smartquotes = False


def leave_out_links_to_files(app, name, source):
    """Links to files of the repository that are no pages become text; others are checked.

    Pages and notebooks lie one folder below the root, so that all such links begin with "../".
    """
    del app, name

    def shorten(link):
        text, path, anchor = link.groups("")
        if path.startswith("docs/"):  # from a notebook, which has moved into docs/
            return f"[{text}](../{path.removeprefix('docs/')}{anchor})"
        if path.startswith("notebooks/"):  # from a page, beside which the notebooks lie here
            return f"[{text}]({path}{anchor})"
        return text if (ROOT / path).exists() else link[0]

    source[0] = re.sub(r"\[([^][]*)\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)", shorten, source[0])


def setup(app):
    """Called by Sphinx."""
    app.add_lexer("console", BashLexer)  # commands without a prompt
    app.connect("source-read", leave_out_links_to_files)


# Sphinx reads what lies below its own folder only.
shutil.rmtree(DOCS / "notebooks", ignore_errors=True)
for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
    (DOCS / "notebooks").mkdir(exist_ok=True)
    shutil.copy(notebook, DOCS / "notebooks")
