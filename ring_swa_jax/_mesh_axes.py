"""Which axes of a mesh cut the batch, the sequence and the heads of global arrays."""

import dataclasses
import math
from collections.abc import Hashable

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh

from ring_swa_jax._axis import AxisName, check_axis, names_of
from ring_swa_jax._repeated_work import warn_of_unnamed_axes


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Which mesh axes cut which dimension; ``mesh=None`` where no axis cuts anything."""

    mesh: Mesh | AbstractMesh | None
    seq: AxisName | None
    batch: AxisName | None
    head: AxisName | None

    @classmethod
    def resolve(
        cls,
        q: Array,
        mesh: Mesh | AbstractMesh | None,
        seq_axis: AxisName | None,
        batch_axis: AxisName | None,
        head_axis: AxisName | None,
    ) -> "MeshAxes":
        """The axes of a call of `ring_attention` with these arguments.

        Raises:
            TypeError: an argument that cannot name axes.
            ValueError: an axis that the mesh has not, that a surrounding shard_map has, or that is
                named twice; sizes of q that the devices of an axis do not divide.
        """
        check_axis("seq_axis", seq_axis)
        check_axis("batch_axis", batch_axis)
        check_axis("head_axis", head_axis)
        context = jax.sharding.get_abstract_mesh()
        if mesh is None or context.manual_axes:  # inside a shard_map there is no other mesh
            mesh = context
        batch_axis, head_axis = _axes_of_sharding(q, mesh, seq_axis, batch_axis, head_axis)
        named = {"seq_axis": seq_axis, "batch_axis": batch_axis, "head_axis": head_axis}
        used: dict[Hashable, str] = {}
        for argument, axis in named.items():
            for name in names_of(axis):
                if not mesh.axis_names:
                    raise ValueError(
                        f"{argument}={axis!r} needs a mesh, and none is set: call inside `with "
                        f"jax.set_mesh(mesh):` or pass mesh=..., or pass {argument}=None if that "
                        "dimension is not cut"
                    )
                if name not in mesh.axis_names:
                    raise ValueError(
                        f"{argument}={axis!r} is not an axis of the mesh, which has "
                        f"{mesh.axis_names}; name one of these, or pass {argument}=None if that "
                        "dimension is not cut"
                    )
                if name in context.manual_axes:
                    raise ValueError(
                        f"{argument}={axis!r} is already manual in the surrounding jax.shard_map; "
                        "call ring_sliding_window_attn or ring_streaming_llm_attn there instead"
                    )
                if name in used:
                    raise ValueError(
                        f"mesh axis {name!r} is named by {used[name]} and by {argument}; an axis "
                        "can cut one dimension only"
                    )
                used[name] = argument
        resolved = cls(mesh, *named.values()) if used else cls(None, None, None, None)
        resolved._check_sizes(q)
        warn_of_unnamed_axes(mesh, used)
        return resolved

    def explicit_axes(self) -> set[Hashable]:
        """The Explicit axes of the mesh."""
        if self.mesh is None:
            return set()
        kinds = zip(self.mesh.axis_names, self.mesh.axis_types, strict=True)
        return {name for name, kind in kinds if kind == AxisType.Explicit}

    def size(self, axis: AxisName | None) -> int:
        """How many devices an axis, or a tuple of axes, has."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[name] for name in names_of(axis))

    def _check_sizes(self, q: Array) -> None:
        pad = "pad the sequence and give the padding a negative segment id"
        for argument, axis, dimension, length, mend in (
            ("seq_axis", self.seq, "sequence length", q.shape[1], pad),
            ("batch_axis", self.batch, "batch size", q.shape[0], "use more rows or fewer devices"),
            ("head_axis", self.head, "number of query heads", q.shape[2], "use fewer devices"),
        ):
            if length % self.size(axis):
                raise ValueError(
                    f"the {dimension} {length} is not a multiple of the {self.size(axis)} devices "
                    f"of {argument}={axis!r}; {mend}"
                )


def _axes_of_sharding(
    q: Array,
    mesh: Mesh | AbstractMesh,
    seq_axis: AxisName | None,
    batch_axis: AxisName | None,
    head_axis: AxisName | None,
) -> tuple[AxisName | None, AxisName | None]:
    """Batch and head axes, read from the sharding of q on Explicit axes where not given."""
    if AxisType.Explicit not in mesh.axis_types:
        return batch_axis, head_axis
    spec = (*jax.typeof(q).sharding.spec, None, None, None, None)
    if spec[1] is not None and names_of(spec[1]) != names_of(seq_axis):
        raise ValueError(
            f"seq_axis={seq_axis!r}, but the sequence of q is cut over {spec[1]!r}; name that "
            "axis, or move q, k and v first with jax.sharding.reshard"
        )
    return batch_axis or spec[0], head_axis or spec[2]


def sequence_devices(
    q: Array,
    mesh: Mesh | AbstractMesh | None,
    seq_axis: AxisName | None,
    batch_axis: AxisName | None,
    head_axis: AxisName | None,
) -> int:
    """Over how many devices `ring_attention` would cut the sequence of q."""
    axes = MeshAxes.resolve(q, mesh, seq_axis, batch_axis, head_axis)
    return axes.size(axes.seq)
