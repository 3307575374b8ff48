"""One of two processes: `python -m tests.helpers.process_worker INDEX PORT cpu|gpu`.

Each has two CPU devices, or the GPU of its index. Runs ring_attention forward and backward over
all devices and compares its own parts of the results with the oracle. Exits with 0 only if they
agree.
"""

import math
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.cases import Case
from tests.helpers.oracle import Result
from tests.helpers.routes import TOLERANCE, make_mesh, ring_attention, with_gradients

CASES = {
    "cpu": [
        Case(6, 4, 8, 3, ((5, 7, -2, 10), (23, 1)), batch=2, heads=(4, 2), learned=True),
        Case(6, 4, 4, batch=1, heads=(2, 1), dims=(16, 32)),
    ],
    "gpu": [
        Case(300, 2, 70, 3, ((100, 350, -50, 100), (599, 1)), batch=2, heads=(4, 2), learned=True),
        Case(300, 2, 290, heads=(4, 1), dims=(64, 64), dtype="bfloat16"),
    ],
}
LOCAL_DEVICES = {"cpu": 2, "gpu": 1}


def main(index, port, platform):
    local = LOCAL_DEVICES[platform]
    jax.config.update("jax_num_cpu_devices", local)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=2,
        process_id=index,
        local_device_ids=[index] if platform == "gpu" else None,
        initialization_timeout=60,
    )
    assert jax.default_backend() == platform
    assert len(jax.devices()) == 2 * local and len(jax.local_devices()) == local
    mesh = make_mesh(seq=2 * local)
    cases = CASES[platform]

    def to_global(x, spec):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    for case in cases:
        (q, k, v, sink), dout = case.arrays()
        q, k, v, dout = (to_global(x, P(None, "seq")) for x in (q, k, v, dout))
        sink = None if sink is None else to_global(sink, P())
        ids = None if case.documents is None else to_global(case.segment_ids(), P(None, "seq"))
        program = jax.jit(with_gradients(ring_attention(case, None, mesh=mesh)))
        result = program(q, k, v, sink, ids, dout)
        relative, absolute = TOLERANCE[case.dtype]
        for name, got, ref in zip(Result._fields, result, case.expected, strict=True):
            if ref is None:
                continue
            for shard in got.addressable_shards:
                part = ref[shard.index]
                bound = relative * np.linalg.norm(ref) + absolute * math.sqrt(ref.size)
                error = np.linalg.norm(np.asarray(shard.data) - part)
                assert error <= bound, (name, shard.index, error, bound)
            assert name == "dsink" or got.addressable_shards[0].data.shape[1] == case.chunk, name
    print("equal", len(cases), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
