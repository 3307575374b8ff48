"""Launches of single Triton kernels, by tiles that the caller chooses, as functions of arrays."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels._kernels import BackwardInputs, ForwardInputs, Queries
from pallas_kernels._spec import KeyRun, Spec
from pallas_kernels._triton.backward_dkv import backward_dkv
from pallas_kernels._triton.backward_dq import backward_dq
from pallas_kernels._triton.backward_sinks import backward_own_sinks
from pallas_kernels._triton.forward import forward
from pallas_kernels._triton.plans import Shapes

WANTED = {"dkey_dvalue": (True, True), "dkey": (True, False), "dvalue": (False, True)}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel for these shapes, one key head and one sequence; ``packed`` with documents."""

    kernel: str
    tiles: object
    shapes: Shapes
    packed: bool = True
    precision: str = "highest"

    def arguments(self):
        """Types of query, key, value, out (and its cotangent), lse (and delta), start."""
        s = self.shapes

        def heads(count, dim):
            return jax.ShapeDtypeStruct((1, s.rows, count, dim), s.dtype)

        numbers = jax.ShapeDtypeStruct((1, s.group, s.rows), jnp.float32)
        start = jax.ShapeDtypeStruct((1, s.rows) if self.packed else (), jnp.int32)
        query, out = heads(s.group, s.head_dim), heads(s.group, s.value_dim)
        return query, heads(1, s.head_dim), heads(1, s.value_dim), out, numbers, start

    def run(self, query, key, value, out, lse, start):
        """Launches the kernel."""
        shapes, run = self.shapes, KeyRun(key, value, 0)
        sinks = shapes.num_sinks if self.kernel in ("forward", "dquery", "sinks") else 0
        spec = Spec(shapes.window, sinks, shapes.head_dim**-0.5, None, self.precision)
        options = {"tiles": self.tiles, "interpret": False}
        if self.kernel == "forward":
            inputs = ForwardInputs(query, (run,), None, None, start)
            return forward(
                spec, inputs, None, rows=(0, shapes.rows), resume=False, out_dtype=query.dtype,
                **options,
            )  # fmt: skip
        options["rows"] = shapes.rows
        if self.kernel == "dquery":
            inputs = BackwardInputs(query, (run,), None, start, out, out, lse)
            return backward_dq(spec, inputs, None, out_dtype=query.dtype, **options)
        queries = Queries(query, out, lse, lse, start)
        if self.kernel == "sinks":
            return backward_own_sinks(spec, queries, run, **options).parts
        return backward_dkv(
            spec, queries, run, None, out_dtype=query.dtype, wanted=WANTED[self.kernel], **options
        )
