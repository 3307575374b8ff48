"""The API reference is that of the source, and help() shows what layers take."""

import inspect
import pydoc
import re
import sys

import pytest

import ring_swa_jax
from ring_swa_jax import linen, nnx
from tests.helpers.processes import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import make_api

from _docstrings import to_markdown


def test_page_is_up_to_date():
    assert make_api.API.read_text(encoding="utf-8") == make_api.page(), (
        "run `python docs/make_api.py`"
    )


def test_page_has_every_public_name():
    described = {name for name, _ in make_api.members()}
    modules = {"": ring_swa_jax, "nnx.": nnx, "linen.": linen}
    public = {f"{prefix}{name}" for prefix, each in modules.items() for name in each.__all__}
    assert public - described == {"__version__"}


def test_docstring_becomes_markdown():
    docstring = r"""What `known` is, :math:`x_1`, ``a:b``.

    .. math:: a +
        b

    Args:
        x: one,
            on two lines: yes.
        y: `known`.

    Returns:
        Something ``like
        this``.
    """
    expected = r"""What <known> is, $x_1$, `a:b`.

$$
a +
    b
$$

**Args**

- `x`: one,
  on two lines: yes.
- `y`: <known>.

**Returns**

Something `like
this`.
"""
    assert to_markdown(docstring, lambda name: f"<{name}>") == expected


@pytest.mark.parametrize("module", [nnx, linen], ids=lambda module: module.__name__)
def test_help_describes_every_argument(module):
    layer = module.RingSlidingWindowAttention
    names = set(inspect.signature(layer).parameters) - {"parent", "name"}  # Flax's own
    assert len(names) > 40
    text = pydoc.render_doc(layer, renderer=pydoc.plaintext)
    assert names <= set(re.findall(r"^ \|      (\w+): ", text, re.MULTILINE))
    assert text.count("window_size: W; a token sees **W + 1 keys**") == 1
