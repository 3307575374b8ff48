"""The backends "mosaic_gpu" and "mosaic_gpu_nondeterministic": Mosaic GPU kernels for Hopper.

The two differ in one thing: whether gradients of queries are added up in a fixed order.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels import _device, _support
from pallas_kernels._kernels import BackwardInputs, ForwardInputs, Gradients, Kernels, PartialSums
from pallas_kernels._mosaic_gpu.backward import choice
from pallas_kernels._mosaic_gpu.forward.kernel import forward
from pallas_kernels._mosaic_gpu.forward.padding import zeroes_in_kernel
from pallas_kernels._mosaic_gpu.padding import with_zero_padding
from pallas_kernels._mosaic_gpu.tiles import MosaicTiles, mosaic_tiles
from pallas_kernels._spec import KeyRun, Spec, State
from pallas_kernels._xla.kernels import XlaKernels


@dataclasses.dataclass(frozen=True)
class MosaicKernels:
    """Mosaic GPU's kernels. Where none is the fastest backward kernel, another backend's.

    Attributes:
        name: the implementation, for messages.
        fallback: the backend that computes the backward pass where `choice.fused_backward` is None.
        deterministic: whether gradients of queries are added up in a fixed order.
    """

    name: str
    fallback: Kernels
    deterministic: bool

    def check(
        self, spec: Spec, query: Float[Array, "B T N H"], value: Float[Array, "B T K Hv"]
    ) -> None:
        """As `Kernels.check`."""
        _support.check_mosaic_gpu(self.name)
        self.fallback.check(spec, query, value)
        _support.check_head_dims(self.name, query, value)
        _support.check_dtype(self.name, query, ("bfloat16", "float16"))

    def query_tile_rows(self, spec: Spec, query: Float[Array, "B T N H"], run: KeyRun) -> int:
        """As `Kernels.query_tile_rows`."""
        return _tiles_for(spec, query, run, whole=True).positions

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
        query, runs, start = inputs.query, inputs.runs, inputs.start
        whole = not resume and out_dtype == query.dtype
        tiles = _tiles_for(spec, query, runs[0], whole=whole)
        if start.ndim and not zeroes_in_kernel(spec, start, tiles):
            runs = with_zero_padding(spec, runs, start, ("value",))
        return forward(
            spec,
            inputs._replace(runs=runs),
            state,
            rows=rows,
            resume=resume,
            out_dtype=out_dtype,
            tiles=tiles,
            programs=_programs(spec, packed=start.ndim > 0),
        )

    @property
    def prefers_fused_halo_forward(self) -> bool:
        """The halo travels under the launch of the rows that do not see it."""
        return False

    def prefers_fused_halo_backward(self, spec: Spec, inputs: BackwardInputs) -> bool:
        """A fused kernel takes less time for a halo and own keys together than one by one."""
        return choice.fused_backward(spec, inputs) is not None

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
        """As `Kernels.backward`."""
        fused = choice.fused_backward(spec, inputs)
        if fused is None:
            return self.fallback.backward(
                spec,
                inputs,
                dquery,
                rows=rows,
                dquery_dtype=dquery_dtype,
                dkey_dtype=dkey_dtype,
            )
        return fused(
            spec,
            inputs,
            dquery,
            rows=rows,
            dquery_dtype=dquery_dtype,
            dkey_dtype=dkey_dtype,
            deterministic=self.deterministic,
        )


def _fallback(name: str) -> Kernels:
    """Triton's kernels, or those of "xla" where this JAX has no Triton."""
    if not _support.has_triton():
        return XlaKernels()
    from pallas_kernels._triton.kernels import TritonKernels

    return TritonKernels(name)


def _kernels(name: str, *, deterministic: bool) -> MosaicKernels:
    return MosaicKernels(name, _fallback(name), deterministic)


KERNELS: Kernels = _kernels("mosaic_gpu", deterministic=True)
KERNELS_NONDETERMINISTIC: Kernels = _kernels("mosaic_gpu_nondeterministic", deterministic=False)


def _programs(spec: Spec, *, packed: bool) -> int:
    """The most programs of a forward launch, which share the tiles of queries.

    As a rule one on each multiprocessor: while it ends a tile, it fetches what its next one needs.
    23 documents without a window took 12% less time on an H100 than with a program for each tile.
    With neither a window nor documents tiles are long, and differ. So each tile has a program of
    its own, and the GPU starts the next program wherever one has ended.
    """
    shares = spec.window is not None or packed
    return _device.multiprocessors() if shares else 2**31 - 1


def _tiles_for(
    spec: Spec, query: Float[Array, "B T N H"], run: KeyRun, *, whole: bool
) -> MosaicTiles:
    """The tiles of a forward launch; ``whole`` is that of `mosaic_tiles`."""
    heads, dim = query.shape[2:]
    group_size = heads // run.key.shape[2]
    return mosaic_tiles(
        dim, run.value.shape[-1], spec.window, group_size, whole=whole, sinks=spec.num_sinks > 0
    )
