"""How much memory a device needs for the ring, as a formula.

With chunks of T tokens, B rows, N and K heads of size H in bfloat16 and Wh keys in the halo, each
term in bytes of a device:

* inputs: query, key and value, B T (N + 2 K) H 2; for the backward pass dout, B T N H 2;
* results: out, B T N H 2; for the backward pass dquery, dkey and dvalue, B T (N + 2 K) H 2;
* halo: keys and values before the chunk, Wh B K 2 H 2. Twice: as a message and as it arrives, and
  backward as it was kept and as gradients that travel;
* log-sum-exp, B T N 4; backward also delta = sum(out * dout), B T N 4;
* backward, dquery of the rows that see the halo, in float32 from one launch to the next:
  B Wh N H 4. It takes no memory where it fits into dkey, which is written later;
* where more than half of the rows see the halo, out in float32 from one launch to the next,
  B T N H 4, and a second log-sum-exp, in the forward pass.

What a packed row adds (starts of its sequences, 4 T) and what sink tokens add is far below these.
The kernels are the Triton ones; "xla" and interpret mode have buffers of their own.
"""

import dataclasses

from benchmarks._ring_shapes import RingShape

ELEMENT = 2
"""Bytes of a bfloat16."""
TILE = 128
"""Launches begin at multiples of a query tile; no kernel has a larger one."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device: inputs, results, and what is needed in between."""

    inputs: int
    results: int
    temporary: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.inputs + self.results + self.temporary


def of_program(program) -> Memory:
    """What the compiler says of a compiled program."""
    found = program.memory_analysis()
    return Memory(
        found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes
    )


def by_formula(shape: RingShape, devices: int, *, backward: bool) -> Memory | None:
    """The formula of this module; None for a halo of several hops, which it does not cover."""
    chunk, halo = shape.chunk(devices), shape.halo(devices)
    if halo > chunk:
        return None
    rows = shape.batch * chunk
    queries = rows * shape.heads * shape.dim * ELEMENT
    keys = rows * shape.kv_heads * shape.dim * ELEMENT
    lse = rows * shape.heads * 4
    fetched = 2 * keys * halo // chunk
    forward = 2 * fetched + lse
    if 2 * (-(-halo // TILE) * TILE) > chunk:
        forward += 2 * queries + lse
    inputs, results = queries + 2 * keys, queries
    if not backward:
        return Memory(inputs, results, forward)
    partial = 2 * queries * halo // chunk
    partial = 0 if partial <= keys else partial
    temporary = max(forward, 2 * fetched + 2 * lse + partial)
    return Memory(inputs + queries, results + queries + 2 * keys, temporary)
