"""The mesh axis (or axes) over which a sequence is cut."""

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax._src import core
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Shaped

from pallas_kernels import exists, vary_over, varying_axes
from ring_swa_jax._arrays import AnyArray

AxisName = Hashable | tuple[Hashable, ...]


def names_of(axis: AxisName | None) -> tuple[Hashable, ...]:
    """The names of the mesh axes in ``axis``."""
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def check_axis(argument: str, axis: AxisName | None) -> None:
    """Checks that an argument may name mesh axes.

    Raises:
        TypeError: it cannot, as a list of names cannot.
    """
    try:
        hash(axis)
    except TypeError:
        raise TypeError(
            f"{argument} must be the name of a mesh axis, a tuple of names or None, got {axis!r}"
        ) from None


@dataclasses.dataclass(frozen=True)
class SequenceAxis:
    """A manual mesh axis of ``size`` chunks; ``name=None`` means one chunk, the whole sequence."""

    name: AxisName | None
    size: int

    @classmethod
    def named(cls, name: AxisName | None) -> "SequenceAxis":
        """The axis of this name in the surrounding shard_map.

        Raises:
            ValueError: there is none.
            TypeError: this is no name.
        """
        check_axis("axis_name", name)
        if name is None:
            return cls(None, 1)
        manual = jax.sharding.get_abstract_mesh().manual_axes  # a vmap's axis is none of them
        if not set(names_of(name)) <= set(manual):
            raise ValueError(
                f"axis_name={name!r} is not an axis of a surrounding jax.shard_map "
                f"(its axes are {manual}); call this function inside jax.shard_map over a mesh "
                f"with that axis, or pass axis_name=None for a sequence that is here as a whole"
            )
        return cls(name, lax.axis_size(name))

    def index(self) -> Int[Array, ""]:
        """Which chunk this device holds."""
        return jnp.int32(0) if self.name is None else lax.axis_index(self.name)

    def pass_on(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Sends ``x`` to the next device of the ring; returns the array of the device before."""
        pairs = [(device, (device + 1) % self.size) for device in range(self.size)]
        return lax.ppermute(x, self.name, pairs)


def same_varying(axis: SequenceAxis, *trees):
    """Casts all arrays to vary over the same manual axes, the sequence's among them.

    The transpose of the cast sums a gradient over the devices that share an array.
    """
    axes: set[Hashable] = set()
    for leaf in [axis.index(), *jax.tree.leaves(trees)]:
        axes |= varying_axes(leaf)
    return jax.tree.map(lambda x: vary_over(x, axes), trees)


def after(x: Array, other: Array | None = None) -> Array:
    """``x``, but only once ``other`` has been computed.

    Without a latency-hiding scheduler, XLA overlaps an exchange with a kernel only if that kernel
    depends on the message. A barrier alone is not enough, because the compiler drops it before it
    orders the program. Until then the barrier keeps the compiler from reading the number from an
    earlier array.
    """
    if other is None or not other.size:
        return x
    number = lax.optimization_barrier(other)[(0,) * other.ndim]
    # A constant start is never -1: of two equal values XLA would drop `exists`.
    return jnp.where(exists(number), x, jnp.full_like(x, -1))


def vmapped_axes() -> frozenset[Hashable]:
    """Mesh axes that surrounding ``jax.vmap`` name as their ``spmd_axis_name``.

    JAX has no public name for them. Inside a ``jax.shard_map`` with ``check_vma=True`` its vmap of
    loops casts some values to vary over these axes and forgets others.
    """
    return frozenset(core.get_axis_env().spmd_axis_names)


def explicit_axes(x: Shaped[AnyArray, "..."]) -> set[Hashable]:
    """Names of the Explicit axes of the mesh that x lies on."""
    mesh = jax.typeof(x).sharding.mesh
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in axes if kind == AxisType.Explicit}


def mesh_of(x: Shaped[Array, "..."]) -> Mesh | AbstractMesh:
    """The mesh that x lies on; an array outside of jit moves only on a mesh of devices."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    assert isinstance(sharding, NamedSharding)
    return sharding.mesh


def reshard(
    x: Shaped[Array, "..."], mesh: Mesh | AbstractMesh, spec: PartitionSpec
) -> Shaped[Array, "..."]:
    """``jax.sharding.reshard`` on a mesh that need not be the one of ``jax.set_mesh``."""
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def spec_of(x: Shaped[AnyArray, "..."]) -> tuple:
    """Mesh axes of every dimension of x, as far as its type says."""
    spec = jax.typeof(x).sharding.spec
    return (*spec, *[None] * (jnp.ndim(x) - len(spec)))
