"""Compiles a case's forward and backward programs and lists their collectives.

As a script it does so on as many CPU devices as it is told, and prints JSON:
`python -m tests.helpers.ring_programs DEVICES WINDOW SINKS IMPLEMENTATION`.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.cases import Case
from tests.helpers.hlo import Collective, collectives
from tests.helpers.routes import ROUTES, documents_of

CHUNK = 8


def programs(case, route, implementation, sharded=(None, "seq", None)):
    """(forward, backward): lists of hlo.Collective, the backward by itself."""
    build = ROUTES[route] if isinstance(route, str) else route
    function, mesh = build(case, implementation)
    (*qkv, sink), dout = case.arrays()
    sharding = NamedSharding(mesh, P(*sharded))
    *qkv, dout = jax.device_put((*qkv, dout), sharding)
    inputs, documents = (*qkv, sink), documents_of(case)

    def forward(q, k, v, sink):
        return jax.vjp(lambda *x: function(*x, documents), q, k, v, sink)

    def backward(pull, dout):
        return pull(dout)

    def compiled(program, *arguments):
        options = {"xla_backend_optimization_level": 0}  # LLVM's alone: it moves no bytes
        return jax.jit(program).lower(*arguments).compile(compiler_options=options)

    with jax.set_mesh(mesh):
        ahead = compiled(forward, *inputs)
        back = compiled(backward, ahead(*inputs)[1], dout)
    return collectives(ahead.as_text()), collectives(back.as_text())


def script_case(devices, window, sinks):
    """The case that the script compiles."""
    return Case(CHUNK, devices, window, sinks)


def with_devices(devices, window, sinks, implementation):
    """Runs the script: (forward, backward) as `programs` gives them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}
    environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.helpers.ring_programs"]
    command += [str(x) for x in (devices, window, sinks, implementation)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pair = json.loads(done.stdout.splitlines()[-1])
    return tuple([Collective(**fields) for fields in found] for found in pair)


if __name__ == "__main__":
    devices, window, sinks = map(int, sys.argv[1:4])
    pair = programs(script_case(devices, window, sinks), "shard_novma", sys.argv[4])
    print(json.dumps([[dataclasses.asdict(c) for c in found] for found in pair]))
