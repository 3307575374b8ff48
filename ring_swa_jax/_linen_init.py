"""Linen's initialisation: models often run it with one row or token, which no mesh can cut."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from flax.linen import module as linen_module
from jax.sharding import AbstractMesh, Mesh

from ring_swa_jax._axis import AxisName, names_of
from ring_swa_jax._repeated_work import RepeatedWorkWarning


def initialising() -> bool:
    """Whether a Linen module that calls this is initialising its parameters.

    Flax has no public API for the module that is running, so this reads a private one.
    """
    module = linen_module._context.module_stack[-1]
    return module is not None and module.is_initializing()


def axes_that_divide(
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh | None,
    seq_axis: AxisName | None,
    batch_axis: AxisName | None,
) -> dict[str, Any]:
    """``seq_axis`` and ``batch_axis`` for [B, S, ...], None where one does not divide S or B.

    The third setting is the contiguous layout, which any length allows.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh

    def divides(axis, length):
        known = all(name in mesh.axis_names for name in names_of(axis))
        return not known or length % math.prod(mesh.shape[name] for name in names_of(axis)) == 0

    batch, length = shape[:2]
    return {
        "seq_axis": seq_axis if divides(seq_axis, length) else None,
        "batch_axis": batch_axis if divides(batch_axis, batch) else None,
        "layout": "contiguous",
    }


@contextlib.contextmanager
def repeated_work_is_meant() -> Iterator[None]:
    """Silences `RepeatedWorkWarning`, for axes that `axes_that_divide` replaced by None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RepeatedWorkWarning)
        yield
