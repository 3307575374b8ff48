"""A warning about mesh axes that no argument names, whose devices repeat the same work."""

import warnings
from collections.abc import Collection, Hashable

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from ring_swa_jax._axis import vmapped_axes


class RepeatedWorkWarning(UserWarning):
    """No argument names an Auto mesh axis of several devices, so all of them do the same work.

    Python shows it once for each such mesh. Where the repetition is meant, ignore it:
    ``warnings.simplefilter("ignore", ring_swa_jax.RepeatedWorkWarning)``.
    """


def warn_of_unnamed_axes(mesh: Mesh | AbstractMesh, named: Collection[Hashable]) -> None:
    """Warns about Auto axes that no argument names and no shard_map or vmap around the call uses.

    Explicit axes need no warning: there the array's type shows how the array is cut.
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
