"""One of two processes, two CPU devices each: `python -m tests.process_worker INDEX PORT`.

Runs ring_attention forward and backward over all four devices and compares its own parts of the
results with the oracle. Exits with 0 only if they agree.
"""

import math
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.cases import Case
from tests.oracle import Result
from tests.routes import TOLERANCE, make_mesh, ring_attention, with_gradients

CASES = [
    Case(6, 4, 8, 3, ((5, 7, -2, 10), (23, 1)), batch=2, heads=(4, 2), learned=True),
    Case(6, 4, 4, batch=1, heads=(2, 1), dims=(16, 32)),
]


def main(index, port):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(
        f"127.0.0.1:{port}", num_processes=2, process_id=index, initialization_timeout=60
    )
    assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    mesh = make_mesh(seq=4)

    def to_global(x, spec):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])

    for case in CASES:
        (q, k, v, sink), dout = case.arrays()
        q, k, v, dout = (to_global(x, P(None, "seq")) for x in (q, k, v, dout))
        sink = None if sink is None else to_global(sink, P())
        ids = None if case.documents is None else to_global(case.segment_ids(), P(None, "seq"))
        program = jax.jit(with_gradients(ring_attention(case, "xla", mesh=mesh)))
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
    print("equal", len(CASES), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
