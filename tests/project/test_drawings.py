"""The pictures in docs/ are those that its scripts draw."""

import shutil

import numpy as np
import pytest
from matplotlib import image

from tests.helpers.processes import CPU, ROOT, start, succeed

pytestmark = pytest.mark.slow
DOCS = ROOT / "docs"
PICTURES = {
    "balance.png",
    "halo.png",
    "hops.png",
    "mask.png",
    "mask_both_sides.png",
    "schedule.png",
    "sinks.png",
    "tiles.png",
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder in which all scripts have drawn."""
    folder = tmp_path_factory.mktemp("drawings")
    for path in DOCS.glob("*.py"):
        shutil.copy(path, folder)
    scripts = sorted(folder.glob("make_*_figure*.py"))
    assert scripts
    succeed([start(script, **CPU) for script in scripts])
    assert {path.name for path in folder.glob("*.png")} == PICTURES
    return folder


def blocks(picture, size=16):
    """Mean colors of squares of pixels."""
    height, width = (n // size for n in picture.shape[:2])
    picture = picture[: height * size, : width * size, :3]
    return picture.reshape(height, size, width, size, 3).mean((1, 3))


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_picture(drawn, name):
    old, new = image.imread(DOCS / name), image.imread(drawn / name)
    assert old.shape == new.shape
    # Another matplotlib may set letters a little otherwise; a cell or an arrow may not move.
    assert np.abs(old - new).mean() < 0.01
    assert np.abs(blocks(old) - blocks(new)).max() < 0.2
    assert (DOCS / name).stat().st_size < 150_000
