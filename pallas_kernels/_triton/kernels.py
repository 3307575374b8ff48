"""The backend "triton": Pallas-Triton kernels, for NVIDIA GPUs from Ampere on.

On a CPU they run in Pallas' interpreter.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels import _device, _support
from pallas_kernels._kernels import BackwardInputs, ForwardInputs, Gradients, Kernels, Queries
from pallas_kernels._spec import KeyRun, SinkRun, Spec, State
from pallas_kernels._triton.backward_dkv import DistantSinks, backward_dkv
from pallas_kernels._triton.backward_dq import backward_dq
from pallas_kernels._triton.backward_sinks import backward_fetched_sinks, backward_own_sinks
from pallas_kernels._triton.forward import forward
from pallas_kernels._triton.plans import Shapes, triton_plan
from pallas_kernels._triton.tiles import TritonPlan


@dataclasses.dataclass(frozen=True)
class TritonKernels:
    """The backend "triton"; its refusals speak of the implementation ``name``."""

    name: str = "triton"

    def check(
        self, spec: Spec, query: Float[Array, "B T N H"], value: Float[Array, "B T K Hv"]
    ) -> None:
        """As `Kernels.check`."""
        _support.check_triton(self.name)
        _support.check_head_dims(self.name, query, value)
        _support.check_dtype(self.name, query, ("float32", "bfloat16", "float16"))
        if max(query.size, query.size // query.shape[-1] * value.shape[-1]) >= 2**31:
            raise NotImplementedError(
                f"implementation={self.name!r} counts elements in 32 bits, got q of shape "
                f"{query.shape}"
            )
        self._plan(spec, query, value)

    def query_tile_rows(self, spec: Spec, query: Float[Array, "B T N H"], run: KeyRun) -> int:
        """As `Kernels.query_tile_rows`."""
        return self._plan(spec, query, run.value).forward.query

    def forward(
        self,
        spec: Spec,
        inputs: ForwardInputs,
        state: State | None,
        *,
        rows: tuple[int, int],
        resume: bool,
        out_dtype: jnp.dtype,
    ) -> State:
        """As `Kernels.forward`."""
        return forward(
            spec,
            inputs,
            state,
            rows=rows,
            resume=resume,
            out_dtype=out_dtype,
            tiles=self._plan(spec, inputs.query, inputs.runs[0].value).forward,
            interpret=_support.interprets("triton"),
        )

    @property
    def prefers_fused_halo_forward(self) -> bool:
        """The halo travels under the launch of the rows that do not see it."""
        return False

    def prefers_fused_halo_backward(self, spec: Spec, inputs: BackwardInputs) -> bool:
        """The halo's gradients travel under the launch of the shard's own keys."""
        del spec, inputs
        return False

    def backward(
        self,
        spec: Spec,
        inputs: BackwardInputs,
        dquery: Float[Array, "B R0 N H"] | None,
        *,
        rows: int,
        dquery_dtype: jnp.dtype | None,
        dkey_dtype: jnp.dtype,
    ) -> Gradients:
        """As `Kernels.backward`."""
        query, runs, sinks = inputs.query, inputs.runs, inputs.sinks
        plan = self._plan(spec, query, runs[0].value)
        interpret = _support.interprets("triton")
        dquery, delta = backward_dq(
            spec,
            inputs,
            dquery,
            rows=rows,
            out_dtype=inputs.lse.dtype if dquery_dtype is None else dquery_dtype,
            tiles=plan.dquery,
            interpret=interpret,
        )
        queries = Queries(query, inputs.dout, inputs.lse, delta, inputs.start, inputs.end)
        dsinks = None
        if sinks is not None:
            assert plan.sinks is not None
            key_value = (sinks.key.astype(query.dtype), sinks.value.astype(query.dtype))
            parts = backward_fetched_sinks(
                spec, queries, key_value, rows=rows, tiles=plan.sinks, interpret=interpret
            )
            dsinks = SinkRun(*(x.sum(0) for x in parts))
        dkeys = []
        for run in runs:
            distant = None
            if spec.sinks_in(run.offset):
                assert plan.sinks is not None
                distant = backward_own_sinks(
                    spec, queries, run, rows=rows, tiles=plan.sinks, interpret=interpret
                )
            dkeys.append(
                _dkv_of_run(spec, queries, run, distant, plan, rows, dkey_dtype, interpret)
            )
        return Gradients(dquery, tuple(dkeys), dsinks, delta)

    def _plan(
        self, spec: Spec, query: Float[Array, "B T N H"], value: Float[Array, "B S K Hv"]
    ) -> TritonPlan:
        _, rows, heads, head_dim = query.shape
        num_kv, value_dim = value.shape[2:]
        return triton_plan(
            self.name,
            Shapes(
                query.dtype, head_dim, value_dim, spec.window, heads // num_kv, rows, spec.num_sinks
            ),
            None if _support.interprets("triton") else _device.compiled_gpu(),
        )


KERNELS: Kernels = TritonKernels()


def _dkv_of_run(
    spec: Spec,
    queries: Queries,
    run: KeyRun,
    distant: DistantSinks | None,
    plan: TritonPlan,
    rows: int,
    dkey_dtype: jnp.dtype,
    interpret: bool,
) -> tuple[Array, Array]:
    """Gradients of a run's keys and values, by one launch or by one for each of the two."""
    if plan.dvalue is None:
        launches = [(plan.dkey, (True, True))]
    else:
        launches = [(plan.dkey, (True, False)), (plan.dvalue, (False, True))]
    dkey, dvalue = (
        gradient
        for tiles, wanted in launches
        for gradient in backward_dkv(
            spec,
            queries,
            run,
            distant,
            out_dtype=dkey_dtype,
            rows=rows,
            tiles=tiles,
            wanted=wanted,
            interpret=interpret,
        )
    )
    return dkey, dvalue
