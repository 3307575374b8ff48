"""One of two processes with different settings.

Run as `python -m tests.helpers.disagreeing_worker INDEX PORT`.

Exits with 0 only if check_processes says what differs, in both processes, and is content otherwise.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_swa_jax import check_processes


def different_data(mesh):
    """(message, what each process has): a wrong seed, another layout of documents, a device."""
    ids = np.repeat(np.arange(64), 64)[None]  # long enough for repr to leave out its middle
    layout = ids.copy()
    layout[0, 2048] -= 1
    parameters = [{"w": jax.random.normal(jax.random.key(seed), (3,)), "b": 0} for seed in range(2)]

    def replicated(values):
        """The same array on all devices, by its type; `values` are what they really hold."""
        here = jax.local_devices()
        shards = [jax.device_put(np.full(2, x), d) for x, d in zip(values, here, strict=True)]
        return jax.make_array_from_single_device_arrays((2,), NamedSharding(mesh, P()), shards)

    number = "[0-9a-f]{8}"
    return (
        ("on data: 0 in process 0, 1 in process 1", (0, 1)),
        (rf"on data: int64\[1, 4096\] with checksum {number} in process 0, int64", (ids, layout)),
        (f"on data: 2 leaves with checksum {number} in process 0, 2 leaves", parameters),
        (r"on data: uint32\[2\] with checksum", (jax.random.key(0), jax.random.key(1))),
        (
            rf"{number} on device \d+ and {number} on device",
            (replicated([5, 5]), replicated([5, 6])),
        ),
        (rf"{number} on device 0 and {number} on device 1 in", (replicated([5, 6]),) * 2),
        ("float32.* in process 0, bfloat16", (jnp.ones(2), jnp.ones(2, jnp.bfloat16))),
    )


def main(index, port):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=index, initialization_timeout=60
    )

    def mesh(shape=(4,), names=("seq",), kind=AxisType.Auto, step=1):
        devices = np.array(jax.devices()[::step]).reshape(shape)
        return Mesh(devices, names, axis_types=(kind,) * len(names))

    check_processes(mesh(), sequence_length=4096, window_size=None)
    square = mesh((2, 2), ("data", "seq"))
    cases = (  # (message, the processes' meshes, their sequence lengths)
        ("on sequence_length: 4096 in process 0, 8192 in process 1", (mesh(),) * 2, (4096, 8192)),
        ("on mesh: seq=4 .Auto. in process 0, data=2 .Auto. x", (mesh(), square), (8, 8)),
        ("seq=4 .Explicit. in process 1", (mesh(), mesh(kind=AxisType.Explicit)), (8, 8)),
        (r"on devices of the mesh: \[0, .*, \[.*, 0\] in", (mesh(), mesh(step=-1)), (8, 8)),
    )
    for message, meshes, lengths in cases:
        with pytest.raises(ValueError, match=message):
            check_processes(meshes[index], sequence_length=lengths[index])
    check_processes(mesh(), sequence_length=4096)
    values = different_data(mesh())
    for message, pair in values:
        with pytest.raises(ValueError, match=message):
            check_processes(mesh(), first=1, data=pair[index])
    ids = values[1][1][0]
    check_processes(mesh(), data=ids, parameters=values[2][1][0])
    part = jax.make_array_from_callback(
        (4,), NamedSharding(mesh(), P("seq")), np.zeros(4).__getitem__
    )
    with pytest.raises(ValueError, match=r"data has an array of shape \(4,\) that is cut over sev"):
        check_processes(mesh(), data=part)
    print("told", len(cases) + len(values), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
