"""Forward kernel in Mosaic GPU, for Hopper.

A program takes tiles of queries one after the other (`scheduler`). Two or three warpgroups compute
(`consumer`), each on its part of a tile's rows; another one fetches queries, keys and values
through TMA into stages, also those of the tiles to come (`producer`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from pallas_kernels._kernels import ForwardInputs
from pallas_kernels._mosaic_gpu.forward.config import ForwardConfig
from pallas_kernels._mosaic_gpu.forward.consumer import Consumer
from pallas_kernels._mosaic_gpu.forward.producer import Producer
from pallas_kernels._mosaic_gpu.forward.scheduler import TileScheduler
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._mosaic_gpu.ragged_copies import allow_any_length
from pallas_kernels._mosaic_gpu.tiles import MosaicTiles
from pallas_kernels._spec import Spec, State

PRODUCER_REGISTERS = 24
"""Of a thread of the producer, which computes nothing: the least that Hopper can set."""


def forward(
    spec: Spec,
    inputs: ForwardInputs,
    state: State | None,
    *,
    rows: tuple[int, int],
    resume: bool,
    out_dtype: jnp.dtype,
    tiles: MosaicTiles,
    programs: int,
) -> State:
    """As `Kernels.forward`, by tiles of this size."""
    query, value = inputs.query, inputs.runs[0].value
    batch, length, heads, _ = query.shape
    scheduler = TileScheduler(spec, inputs, rows, tiles, programs)
    config = ForwardConfig(
        spec=spec,
        scheduler=scheduler,
        tiles=tiles,
        dim=query.shape[3],
        value_dim=value.shape[3],
        dtype=query.dtype,
        out_dtype=out_dtype,
        resume=resume,
        has_fetched_sinks=inputs.sinks is not None,
        has_sink_logits=inputs.sink_logits is not None,
    )
    operands: dict[str, Any] = {**scheduler.operands, "query": query}
    if inputs.sink_logits is not None:
        operands["sink_logits"] = _sink_logits_by_rows(inputs.sink_logits, tiles)
    # A warpgroup stores the log-sum-exp of all its rows of a tile, or of none (`Epilogue`).
    padded = length + -length % scheduler.positions_per_warpgroup
    if state is None:
        out_types = (
            jax.ShapeDtypeStruct((batch, length, heads, config.value_dim), out_dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        )
        out, lse = _launch(config, operands, out_types)
    else:
        pad = ((0, 0), (0, 0), (0, padded - length))
        before = (jax.new_ref(state.out), jax.new_ref(jnp.pad(state.lse, pad)))
        _launch(config, operands, (), *before)
        out, lse = (jax.freeze(ref) for ref in before)
    return State(out, lse[..., :length])


def _launch(config: ForwardConfig, operands: dict[str, Any], out_types: Any, *in_place: Any) -> Any:
    """Runs the kernel; the outputs are new arrays, or the references ``in_place``."""
    consumers = config.tiles.warpgroups
    leaves, tree = jax.tree.flatten(operands)

    def ring_swa_forward(*refs):
        allow_any_length()
        *inputs, out_ref, lse_ref = refs
        inputs = jax.tree.unflatten(tree, inputs)

        def body(smem, barriers):
            warpgroup = lax.axis_index("warpgroup")

            @pl.when(warpgroup < consumers)
            def compute():
                plgpu.set_max_registers(config.tiles.registers, action="increase")
                Consumer(config, inputs, (out_ref, lse_ref), smem, barriers, warpgroup).run()

            @pl.when(warpgroup == consumers)
            def fetch():
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
                Producer(config, inputs, smem, barriers).run()

        pl.run_scoped(body, config.smem(), config.barriers(), collective_axes="warpgroup")

    launch = partial(
        plgpu.kernel,
        ring_swa_forward,
        grid=(config.scheduler.grid,),
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
    return launch(out_type=out_types)(*leaves, *in_place)


def _sink_logits_by_rows(
    sink_logits: Float[Array, "B N"], tiles: MosaicTiles
) -> Float[Array, "B head_tiles ROWS"]:
    """The learned sink of each row of a warpgroup, for every tile of heads."""
    batch, heads = sink_logits.shape
    head_tiles = heads // tiles.heads
    by_heads = sink_logits.reshape(batch, head_tiles, tiles.heads, 1)
    by_rows = jnp.broadcast_to(by_heads, (*by_heads.shape[:3], ROWS // tiles.heads))
    return by_rows.reshape(batch, head_tiles, ROWS)
