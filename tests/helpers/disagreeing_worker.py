"""One of two processes with different settings.

Run as `python -m tests.helpers.disagreeing_worker INDEX PORT`.

Exits with 0 only if check_processes says what differs, in both processes, and is content otherwise.
"""

import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from ring_swa_jax import check_processes


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
    print("told", len(cases), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
