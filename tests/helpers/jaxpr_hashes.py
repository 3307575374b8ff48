"""Prints a hash of the jaxpr, forward and backward, of every variant of the compile gate.

A change that only moves or renames code leaves all of them as they are: print them before and
after, `python -m tests.helpers.jaxpr_hashes > before`, and compare. Needs no GPU and no plug-in.
"""

import hashlib
import re

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from tests.helpers import compile_target
from tests.helpers.kernel_variants import VARIANTS

# Where a function stands, what it is called, where an object lies in memory, and which Python
# types hold the arguments of a call.
PLACES = re.compile(
    r" at \S+:\d+|0x[0-9a-f]+|(?<=name=)\S+|(?<=<function )\S+|(?<=_tree=)PyTreeDef.*"
)


def abstract_mesh(devices, target="h100"):
    """Mesh of so many GPUs, none of them here, with the axis "seq"."""
    device = AbstractDevice(
        device_kind=compile_target.device_kind(target), num_cores=None, platform="cuda"
    )
    return AbstractMesh((devices,), ("seq",), axis_types=(AxisType.Auto,), abstract_device=device)


def hash_of(variant):
    """Hash of the variant's jaxpr, without names and places in files."""
    mesh = abstract_mesh(variant.devices, variant.target)
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(variant.program)(*variant.arguments(mesh))
    text = PLACES.sub("", jaxpr.pretty_print(use_color=False))
    return hashlib.sha256(text.encode()).hexdigest()[:16], len(text)


def main():
    """One line a variant: its name, the hash, and the jaxpr's length."""
    for name, variant in VARIANTS.items():
        print(name, *hash_of(variant), flush=True)


if __name__ == "__main__":
    main()
