"""Devices and processes of `train_lm.py`."""

import argparse
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# As many as a CPU plays where nobody says how many.
CPU_DEVICES = 8
# After so long without a sign of life a process counts as dead, and the others end.
HEARTBEAT_SECONDS = 30
Model = TypeVar("Model", bound=nnx.Module)


def start_jax(args: argparse.Namespace) -> int:
    """Starts JAX, in several processes if asked for; returns how many devices the run takes.

    Raises:
        ValueError: there are not as many.
    """
    # This must come before JAX looks at its devices for the first time.
    if args.coordinator or args.distributed:
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    jax.config.update(
        "jax_num_cpu_devices", (args.devices or CPU_DEVICES) // (args.num_processes or 1)
    )
    number = args.devices or jax.device_count()
    if number > jax.device_count():
        raise ValueError(f"--devices {number}, but there are {jax.device_count()}")
    if number % args.data:
        raise ValueError(f"--data {args.data} does not divide the {number} devices")
    return number


def make_mesh(data: int, seq: int) -> Mesh:
    """The first devices of all processes: batches are cut in `data` parts, sequences in `seq`."""
    # "Auto": the compiler distributes everything but the attention, which does that itself.
    devices = jax.devices()[: data * seq]
    return jax.make_mesh((data, seq), ("data", "seq"), (AxisType.Auto,) * 2, devices=devices)


def one_device_mesh() -> Mesh:
    """The same mesh with one device of this process only: nothing is distributed."""
    devices = jax.local_devices()[:1]
    return jax.make_mesh((1, 1), ("data", "seq"), (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def cut(mesh: Mesh) -> NamedSharding:
    """Of arrays [batch, sequence]: batch over "data", sequence over "seq"."""
    return NamedSharding(mesh, PartitionSpec("data", "seq"))


def on_one_device(model: Model) -> Model:
    """A copy of the replicated model on one device of this process."""
    graph, parameters = nnx.split(model)
    return nnx.merge(graph, jax.device_put(jax.device_get(parameters), jax.local_devices()[0]))
