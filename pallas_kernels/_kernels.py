"""The contract between the schedule of launches and a backend of kernels.

`pallas_kernels._attention` decides which launches there are and in what order. A backend computes
them. Nothing here says how: a backend may use one kernel for a launch, or several.
"""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels._logits import delta_of
from pallas_kernels._spec import Ends, KeyRun, SinkRun, Spec, Starts, State


class ForwardInputs(NamedTuple):
    """What a forward launch reads.

    Attributes:
        query: all queries of the shard.
        runs: keys and values, each run with its position; K divides N.
        sinks: the first tokens of the sequence that crosses into the shard, or None.
        sink_logits: learned sinks, in the accumulator's dtype; None in all launches but one.
        start: where the sequence of each query starts, as `_masks` has it.
        end: where it ends, likewise.
    """

    query: Float[Array, "B T N H"]
    runs: tuple[KeyRun, ...]
    sinks: SinkRun | None
    sink_logits: Float[Array, "B N"] | None
    start: Starts
    end: Ends = None


class BackwardInputs(NamedTuple):
    """What a backward launch reads.

    Attributes:
        query: all queries of the shard.
        runs: keys and values, each run with its position; K divides N.
        sinks: the first tokens of the sequence that crosses into the shard, or None.
        start: where the sequence of each query starts, as `_masks` has it.
        out: the output of the whole forward pass, in the dtype of ``query``; None: see ``delta``.
        dout: its cotangent, in the same dtype.
        lse: log-sum-exp over *all* keys of a query, in the accumulator's dtype.
        end: where the sequence of each query ends, as `_masks` has it.
        delta: ``rowsum(out * dout)`` in the accumulator's dtype, where ``out`` is None.
    """

    query: Float[Array, "B T N H"]
    runs: tuple[KeyRun, ...]
    sinks: SinkRun | None
    start: Starts
    out: Float[Array, "B T N Hv"] | None
    dout: Float[Array, "B T N Hv"]
    lse: Float[Array, "B N T"]
    end: Ends = None
    delta: Float[Array, "B N T"] | None = None

    def delta_of(self, rows: int) -> Float[Array, "B N R"]:
        """``rowsum(out * dout)`` of the first ``rows`` queries, in the accumulator's dtype."""
        if self.delta is not None:
            return self.delta[..., :rows]
        assert self.out is not None
        return delta_of(self.out[:, :rows], self.dout[:, :rows], self.lse.dtype)


class Queries(NamedTuple):
    """What the gradients of keys and values need of the queries.

    Attributes:
        query: all queries of the shard.
        dout: cotangent of the output.
        lse: log-sum-exp over all keys of a query.
        delta: ``rowsum(out * dout)``.
        start: where the sequence of each query starts, as `_masks` has it.
        end: where it ends, likewise.
    """

    query: Float[Array, "B T N H"]
    dout: Float[Array, "B T N Hv"]
    lse: Float[Array, "B N T"]
    delta: Float[Array, "B N R"]
    start: Starts
    end: Ends = None


PartialSums = Any
"""A pytree of arrays, in which a backend adds up gradients of queries over several launches."""


class Gradients(NamedTuple):
    """What a backward launch leaves.

    Attributes:
        dquery: of the first ``rows`` queries.
        dkeys: (dkey, dvalue) of each run, as long as the run.
        dsinks: of the fetched sinks, in the accumulator's dtype; None without any.
        delta: ``rowsum(out * dout)`` of the first ``rows`` queries, in the accumulator's dtype.
    """

    dquery: Float[Array, "B R N H"] | PartialSums
    dkeys: tuple[tuple[Float[Array, "B _ K H"], Float[Array, "B _ K Hv"]], ...]
    dsinks: SinkRun | None
    delta: Float[Array, "B N R"]


class Kernels(Protocol):
    """A backend: what computes the launches of one shard.

    Arrays carry the batch first. A backend knows nothing of meshes; where its kernels drop the
    manual mesh axes that its inputs vary over, it puts them back on its results. Every backend
    leaves the same ``lse``, so any backend's ``backward`` may follow any other's ``forward``.
    """

    @property
    def name(self) -> str:
        """The ``implementation`` that users ask for, for messages."""
        ...

    def check(
        self, spec: Spec, query: Float[Array, "B T N H"], value: Float[Array, "B T K Hv"]
    ) -> None:
        """Checks that `forward` and `backward` can compute this on the device compiled for.

        Raises:
            NotImplementedError: they cannot; names the implementation and the argument.
        """
        ...

    def query_tile_rows(self, spec: Spec, query: Float[Array, "B T N H"], run: KeyRun) -> int:
        """Rows of a tile of queries: a launch may begin at any multiple of them."""
        ...

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
        """Attends ``inputs.runs`` and ``inputs.sinks`` from the queries ``rows[0]..rows[1]-1``.

        Args:
            spec: static settings.
            inputs: the arrays.
            state: overwritten at ``rows`` and kept elsewhere; None leaves other rows undefined.
            rows: half-open range of queries; begins at a multiple of `query_tile_rows`.
            resume: continue from ``state`` at ``rows`` instead of from nothing.
            out_dtype: of the output; that of ``state`` where there is one.

        Returns:
            The new state: ``out`` [B, T, N, Hv], and ``lse`` [B, N, T] in the accumulator's dtype.
        """
        ...

    @property
    def prefers_fused_halo_forward(self) -> bool:
        """Whether one `forward` of all rows and all keys is better than one while a hop travels."""
        ...

    def prefers_fused_halo_backward(self, spec: Spec, inputs: BackwardInputs) -> bool:
        """Whether one `backward` of all ``inputs.runs`` is faster than one for each run.

        The gradients of a halo can travel under the launch of the shard's own keys only where each
        has its own launch.
        """
        ...

    def backward(
        self,
        spec: Spec,
        inputs: BackwardInputs,
        dquery: Float[Array, "B R0 N H"] | PartialSums | None,
        *,
        rows: int,
        dquery_dtype: jnp.dtype | None,
        dkey_dtype: jnp.dtype,
    ) -> Gradients:
        """Gradients that flow through ``inputs.runs`` and ``inputs.sinks``.

        Args:
            spec: static settings.
            inputs: the arrays.
            dquery: gradient of the first R0 <= ``rows`` queries through other keys, in the
                accumulator's dtype, or None; or what launches of as many rows have left where
                ``dquery_dtype`` was None. The launch adds it to its own.
            rows: the launch takes the first ``rows`` queries.
            dquery_dtype: of the returned gradient of queries; None where other launches are to
                add to it.
            dkey_dtype: of the returned gradients of keys and values.

        Returns:
            The gradients, and ``delta``.
        """
        ...
