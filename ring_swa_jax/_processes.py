"""Whether the processes of a job agree on what they are about to run."""

import json
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

_BYTES = 65536


def check_processes(mesh: Mesh, **settings: Any) -> None:
    """Checks that all processes have the same mesh and the same settings.

    If processes trace different programs, the job may hang or give wrong numbers, and JAX does not
    notice. Programs differ, for example, if the order of the devices or the length of the sequence
    does. (A window's halo has the same size for all lengths, so its exchange does not fail.) The
    library's other functions do not check this, because they would have to wait for all processes
    in every step. So call this function once, in every process, after
    ``jax.distributed.initialize`` and before the first step. It waits for all processes, and does
    nothing in a job of one process.

    Args:
        mesh: the mesh to run on; axis names, sizes, axis types and the order of the devices count.
        settings: whatever else must be the same everywhere, ``sequence_length=...`` above all;
            compared by their ``repr``.

    Raises:
        ValueError: the processes differ, also in how many devices each has; raised in all of
            them, shows what each one has.

    Example:
        >>> check_processes(mesh, sequence_length=32768, window_size=1023)
    """
    if jax.process_count() == 1:
        return
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        shown = ", ".join(f"{count} in process {n}" for n, count in sorted(devices.items()))
        raise ValueError(
            f"the processes have different numbers of devices: {shown}; start all of them with "
            "as many"
        )
    mine = {
        "mesh": " x ".join(
            f"{name}={size} ({kind.name})"
            for name, size, kind in zip(
                mesh.axis_names, mesh.devices.shape, mesh.axis_types, strict=True
            )
        ),
        "devices of the mesh": str([device.id for device in mesh.devices.flat]),
        **{name: repr(value) for name, value in settings.items()},
    }
    everyone = _gathered(mine)
    found = []
    for name in dict.fromkeys(name for one in everyone for name in one):
        values = [one.get(name, "not given") for one in everyone]
        if len(set(values)) > 1:
            shown = ", ".join(f"{value} in process {n}" for n, value in enumerate(values))
            found.append(f"{name}: {shown}")
    if found:
        raise ValueError(
            f"the processes disagree on {'; '.join(found)}. Start all of them with the same "
            "settings and make the mesh of the same devices in the same order"
        )


def _gathered(mine: dict[str, str]) -> list[dict[str, str]]:
    """What every process has."""
    text = json.dumps(mine).encode()
    if len(text) > _BYTES:
        raise ValueError(f"settings of {len(text)} characters, more than {_BYTES}; give fewer")
    message = np.zeros(_BYTES, np.uint8)
    message[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(message)
    return [json.loads(bytes(row).rstrip(b"\0")) for row in np.asarray(rows)]
