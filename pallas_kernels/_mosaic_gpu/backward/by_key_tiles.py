"""A backward launch by `fused` or `fused_wide_heads`: what is done with the arrays around it.

These kernels add up the gradients of queries in float32 (`DqSums`). There are four ways from there:
the sums wait for other launches, which add to them; `sinks` adds what flows through sinks that
windows do not reach, and finishes; `fused` itself finishes them, in the program that adds last
(`DqEpilogue`); else a kernel of its own does (`dq_postprocess`).
"""

from functools import partial
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels import _device
from pallas_kernels._kernels import BackwardInputs, Gradients, Queries
from pallas_kernels._mosaic_gpu.backward import dq_postprocess, fused
from pallas_kernels._mosaic_gpu.backward import sinks as sinks_backward
from pallas_kernels._mosaic_gpu.backward.dq_postprocess import DqSums
from pallas_kernels._mosaic_gpu.backward.joined_runs import joined, own_run, split_by_runs
from pallas_kernels._mosaic_gpu.backward.launch_schedule import backward_schedule
from pallas_kernels._mosaic_gpu.backward.tasks import BackwardSchedule
from pallas_kernels._mosaic_gpu.padding import with_zero_padding, zero_delta
from pallas_kernels._spec import KeyRun, SinkRun, Spec

_DkeysOfRuns = tuple[tuple[Float[Array, "B _ K H"], Float[Array, "B _ K Hv"]], ...]


class KeyTileKernel(Protocol):
    """What the modules `fused` and `fused_wide_heads` have in common.

    Attributes:
        KEY_TILE: keys of a program.
    """

    KEY_TILE: int

    def dquery_columns(self, dim: int) -> int:
        """Columns of a slice of dq, for heads of this size."""
        ...

    def backward(
        self,
        spec: Spec,
        queries: Queries,
        run: KeyRun,
        *,
        rows: int,
        dkey_dtype: jnp.dtype,
        num_sms: int,
        deterministic: bool,
        sums: DqSums | None = None,
    ) -> tuple[Any, Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """As `fused.backward`."""
        ...


def by_key_tiles(
    kernel: KeyTileKernel,
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R0 N H"] | DqSums | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype | None,
    dkey_dtype: jnp.dtype,
    deterministic: bool,
) -> Gradients:
    """`FusedBackward` by ``kernel``."""
    runs, sinks, start = inputs.runs, inputs.sinks, inputs.start
    if spec.lookahead and start.ndim:
        runs = with_zero_padding(spec, runs, start, ("key", "value"))
    delta = inputs.delta_of(rows)
    if start.ndim:
        delta = zero_delta(start, delta, spec.first_key)
    queries = Queries(inputs.query, inputs.dout, inputs.lse, delta, start, inputs.end)
    launch = _KeyTileLaunch(
        kernel, spec, queries, runs, rows=rows, dkey_dtype=dkey_dtype, deterministic=deterministic
    )
    dsinks = None
    gradient: Array | DqSums
    if isinstance(dquery, DqSums) or dquery_dtype is None:
        assert dquery is None or isinstance(dquery, DqSums)
        gradient, dkeys = launch.add_to_sums(dquery, dquery_dtype)
    elif sinks_backward.has_sinks_beyond_window(spec, runs, sinks):
        gradient, dkeys, dsinks = launch.through_sinks_too(sinks, dquery, dquery_dtype)
    elif dquery is None and launch.can_round(dquery_dtype):
        gradient, dkeys = launch.rounded(dquery_dtype)
    else:
        gradient, dkeys = launch.with_postprocess(dquery, dquery_dtype)
    return Gradients(gradient, dkeys, dsinks, delta)


class _KeyTileLaunch:
    """A launch of ``kernel``, and what follows it; arguments as of `by_key_tiles`."""

    def __init__(
        self,
        kernel: KeyTileKernel,
        spec: Spec,
        queries: Queries,
        runs: tuple[KeyRun, ...],
        *,
        rows: int,
        dkey_dtype: jnp.dtype,
        deterministic: bool,
    ):
        self.kernel, self.spec, self.queries, self.runs = kernel, spec, queries, runs
        self.rows, self.dkey_dtype, self.deterministic = rows, dkey_dtype, deterministic
        self.run = joined(runs, kernel.KEY_TILE) if len(runs) > 1 else runs[0]
        self.options: dict[str, Any] = {
            "rows": rows,
            "num_sms": _device.multiprocessors(),
            "deterministic": deterministic,
        }
        self.finish = partial(dq_postprocess.postprocess, scale=spec.scale, rows=rows)

    def add_to_sums(
        self, sums: DqSums | None, dquery_dtype: jnp.dtype | None
    ) -> tuple[Array | DqSums, _DkeysOfRuns]:
        """Adds to the sums of other launches; finishes them where there is a dtype."""
        if sums is None:
            query = self.queries.query
            columns = self.kernel.dquery_columns(query.shape[3])
            sums = dq_postprocess.zero_sums(query, rows=self.rows, columns=columns)
        sums, *dkeys = self._launch(self.dkey_dtype, sums=sums)
        dquery: Array | DqSums = sums
        if dquery_dtype is not None:
            dquery = self.finish(sums, None, dtype=dquery_dtype)
        return dquery, self._split(dkeys)

    def through_sinks_too(
        self, sinks: SinkRun | None, dquery: Array | None, dquery_dtype: jnp.dtype
    ) -> tuple[Array, _DkeysOfRuns, SinkRun | None]:
        """Adds what flows through sinks that windows do not reach, in float32."""
        sums, *gradients = self._launch(jnp.dtype(jnp.float32))
        dkeys = list(self._split(gradients))
        own = own_run(self.spec, self.runs)
        n = len(self.runs) - 1 if own is None else own
        dquery, dkey, dvalue, dsinks = sinks_backward.backward(
            self.spec, self.queries, self.runs[n], sinks, sums, dquery, *dkeys[n],
            dquery_dtype=dquery_dtype,
        )  # fmt: skip
        dkeys[n] = dkey, dvalue
        dtype = self.dkey_dtype
        rounded = tuple((dkey.astype(dtype), dvalue.astype(dtype)) for dkey, dvalue in dkeys)
        return dquery, rounded, dsinks

    def can_round(self, dquery_dtype: jnp.dtype) -> bool:
        """Whether the kernel itself scales and rounds the gradients of queries, and had better."""
        last = self.runs[-1]
        # Then each tile of queries has a program that adds last to its gradients.
        has_keys_beside_queries = last.offset + last.key.shape[1] > 0
        if self.kernel is not fused or not self.deterministic or not has_keys_beside_queries:
            return False
        if dquery_dtype != self.queries.query.dtype:
            return False
        schedule = backward_schedule(
            self.spec, self.queries, self.run, rows=self.rows, key_tile=self.kernel.KEY_TILE,
            num_sms=self.options["num_sms"],
        )  # fmt: skip
        return rounds_within_backward(schedule)

    def rounded(self, dquery_dtype: jnp.dtype) -> tuple[Array, _DkeysOfRuns]:
        """Gradients of queries that the kernel has scaled and rounded."""
        dquery, *dkeys = fused.backward(
            self.spec, self.queries, self.run, dkey_dtype=self.dkey_dtype,
            dquery_dtype=dquery_dtype, **self.options,
        )  # fmt: skip
        assert not isinstance(dquery, DqSums)
        return dquery, self._split(dkeys)

    def with_postprocess(
        self, others: Array | None, dquery_dtype: jnp.dtype
    ) -> tuple[Array, _DkeysOfRuns]:
        """Gradients of queries that `dq_postprocess` has finished, those of ``others`` added."""
        sums, *dkeys = self._launch(self.dkey_dtype)
        return self.finish(sums, others, dtype=dquery_dtype), self._split(dkeys)

    def _launch(
        self, dkey_dtype: jnp.dtype, sums: DqSums | None = None
    ) -> tuple[DqSums, Array, Array]:
        return self.kernel.backward(
            self.spec, self.queries, self.run, dkey_dtype=dkey_dtype, sums=sums, **self.options
        )

    def _split(self, dkeys: list[Array]) -> _DkeysOfRuns:
        return split_by_runs(self.runs, self.kernel.KEY_TILE, dkeys)


def rounds_within_backward(schedule: BackwardSchedule) -> bool:
    """Whether `fused` scales and rounds the gradients of queries itself (`DqEpilogue`).

    On an H100 80GB that took 2 to 4% off the backward pass under a window. Without a window it
    added 5% to it, and with 1, 8 and 23 documents 3, 10 and 6%: there the program of a document's
    first keys adds last for all of the document's queries, and waits for their sums at each step.
    So would the last program of a halo that comes last.
    """
    return schedule.window is not None and not schedule.packed and not schedule.halo_last
