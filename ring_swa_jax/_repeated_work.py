"""A warning of mesh axes that nobody named, over which all devices do the same work."""

import warnings
from collections.abc import Collection, Hashable

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from ring_swa_jax._axis import vmapped_axes


class RepeatedWorkWarning(UserWarning):
    """No argument names an Auto mesh axis of several devices, so all of them do the same work.

    Once for each such mesh, as Python shows a warning once. Where it is meant:
    ``warnings.simplefilter("ignore", ring_swa_jax.RepeatedWorkWarning)``.
    """


def warn_of_unnamed_axes(mesh: Mesh | AbstractMesh, named: Collection[Hashable]) -> None:
    """Warns of Auto axes that are neither named nor taken by a shard_map or vmap around the call.

    On Explicit axes an array's type says that it is not cut, so that nothing happens in silence.
    """
    taken = {*named, *vmapped_axes(), *jax.sharding.get_abstract_mesh().manual_axes}
    unnamed = [
        f"{name!r} (of {mesh.shape[name]} devices)"
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and mesh.shape[name] > 1 and name not in taken
    ]
    if unnamed:
        warnings.warn(
            f"no argument names the mesh axis {', '.join(unnamed)}: the arrays may be gathered and "
            "the attention repeated on each of its devices; name it in batch_axis, head_axis or "
            "seq_axis, or, where that is meant, ignore ring_swa_jax.RepeatedWorkWarning",
            RepeatedWorkWarning,
            stacklevel=1,
        )
