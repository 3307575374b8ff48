"""Whether the processes of a job agree on what they are about to run."""

import json
import zlib
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

_BYTES = 65536


def check_processes(mesh: Mesh, **settings: Any) -> None:
    """Checks that all processes have the same mesh, the same settings and the same data.

    If processes trace different programs, the job may hang or give wrong numbers, and JAX does not
    notice. Programs differ, for example, if the order of the devices or the length of the sequence
    does. (A window's halo has the same size for all lengths, so its exchange does not fail.) Nor
    does JAX notice if a process draws other parameters or packs other documents. The library's
    other functions do not check this, because they would have to wait for all processes in every
    step. So call this function once, in every process, after ``jax.distributed.initialize`` and
    before the first step. It waits for all processes, and does nothing in a job of one process.

    Args:
        mesh: the mesh to run on; axis names, sizes, axis types and the order of the devices count.
        settings: whatever else must be the same everywhere, ``sequence_length=...`` above all.
            Values with arrays in them (an array, or any pytree, such as the model's parameters) are
            compared by shape, dtype and a checksum of every element; other values by their
            ``repr``. An array must be whole in every process: ``segment_ids`` as they were loaded,
            or a ``jax.Array`` that is replicated, all of whose copies are looked at. Parts of one
            array differ by nature.

    Raises:
        ValueError: the processes differ, also in how many devices each has; raised in all of
            them, shows what each one has. Or an array is cut over several processes.

    Example:
        >>> check_processes(mesh, sequence_length=32768, seed=0, segment_ids=batch.segment_ids)
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
        **{name: _shown(name, value) for name, value in settings.items()},
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


def _shown(name: str, value: Any) -> str:
    """A short text that differs where two values do."""
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if not any(isinstance(leaf, (np.ndarray, jax.Array)) for _, leaf in leaves):
        return repr(value)
    texts = [f"{jax.tree_util.keystr(path)} {_leaf(name, leaf)}".lstrip() for path, leaf in leaves]
    if len(texts) == 1:
        return texts[0]
    return f"{len(texts)} leaves with checksum {zlib.crc32(json.dumps(texts).encode()):08x}"


def _leaf(name: str, leaf: Any) -> str:
    """A leaf of a pytree: of an array its shape, its dtype and a checksum of each copy here."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, (np.ndarray, jax.Array)):
        return repr(leaf)
    shape = ", ".join(map(str, leaf.shape))
    checksums = {
        device: f"{zlib.crc32(np.asarray(copy).tobytes()):08x}"
        for device, copy in _copies(name, leaf).items()
    }
    if len(set(checksums.values())) == 1:
        (checksum,) = set(checksums.values())
    else:  # with the devices' numbers, so that no two processes have the same text
        checksum = " and ".join(f"{x} on device {device}" for device, x in checksums.items())
    return f"{leaf.dtype}[{shape}] with checksum {checksum}"


def _copies(name: str, array: np.ndarray | jax.Array) -> dict[int | None, np.ndarray | jax.Array]:
    """The array; by the device's number if each device of this process holds all of the array."""
    if isinstance(array, np.ndarray):
        return {None: array}
    if array.is_fully_replicated:
        return {shard.device.id: shard.data for shard in array.addressable_shards}
    if array.is_fully_addressable:
        return {None: array}
    raise ValueError(
        f"{name} has an array of shape {array.shape} that is cut over several processes, as "
        f"{array.sharding} says; give arrays that every process holds as a whole"
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
