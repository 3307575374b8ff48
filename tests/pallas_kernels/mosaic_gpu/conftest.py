"""What tests of the Mosaic GPU kernels in the simulator share."""

import pytest

from pallas_kernels import _derivatives, _device, _support
from pallas_kernels._mosaic_gpu.backward import choice


@pytest.fixture
def on_hopper(monkeypatch):
    """The fused kernels compute all that they can, for a GPU of four multiprocessors."""
    monkeypatch.setattr(choice, "fuses_backward", lambda *_: True)
    monkeypatch.setattr(_device, "multiprocessors", lambda: 4)
    monkeypatch.setattr(_support, "check_mosaic_gpu", lambda name: None)
    # It would trace what the simulator computes with numbers.
    monkeypatch.setattr(_derivatives, "folds_vmap", lambda launch: launch)
