"""Every kernel variant of the model table, as programs with forward and backward pass."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from pallas_kernels import _device
from pallas_kernels._mosaic_gpu.backward.fused import KEY_TILE
from pallas_kernels._triton.plans import Shapes, launch_bytes, triton_plan
from tests.helpers import compile_target
from tests.helpers.models import MODELS, Model

FORWARD, QUERY, KEYS = "ring_swa_forward", "ring_swa_backward_query", "ring_swa_backward_keys"
SINKS, FUSED = "ring_swa_backward_sinks", "ring_swa_backward_fused"
FINISH, SHORT = "ring_swa_backward_finish", "ring_swa_backward_short"
KERNELS = {FORWARD, QUERY, KEYS, SINKS, FUSED, FINISH, SHORT}


@dataclasses.dataclass(frozen=True)
class Variant:
    """Forward and backward of a model's layer, `chunk` tokens on each of the devices.

    ``after`` is how many keys after a query it sees, None for all; ``exchange`` is for layers
    without a window.
    """

    model: Model
    devices: int = 1
    chunk: int = 8192
    dtype: str = "bfloat16"
    sinks: int = 0
    segments: bool = False
    implementation: str | None = "triton"
    target: str = "h100"
    after: int | None = 0
    exchange: str | None = None

    def takes_mosaic(self):
        """Whether Mosaic GPU's kernels compute it."""
        return self.implementation != "triton" and self.target == "h100"

    def kernels(self):
        """The names of those that compute it."""
        if self.takes_mosaic() and self.is_short():
            # A causal halo has kernels of its own.
            halo = {QUERY, KEYS} if self.devices > 1 and self.after == 0 else set()
            return {FORWARD, SHORT} | halo
        if self.takes_mosaic():
            # Who finishes the gradients of queries of a chunk; those of hops are float32.
            own = {SINKS} if self.sinks else set() if self.rounds_within() else {FINISH}
            return {FORWARD, FUSED} | own | ({FINISH} if self.hops() > 1 else set())
        return {FORWARD, QUERY, KEYS, SINKS} if self.sinks else {FORWARD, QUERY, KEYS}

    def shared_memory(self):
        """(asked, available): the most bytes of shared memory of a Triton kernel, as planned."""
        (heads, kv_heads), (dim, value_dim) = self.model.heads, self.model.dims
        window = (
            self.model.window
            if self.model.window and self.model.window < self.chunk * self.devices
            else None
        )
        if window is not None:
            window += self.after
        shapes = Shapes(
            jnp.dtype(self.dtype), dim, value_dim, window, heads // kv_heads, self.chunk, self.sinks
        )
        gpu = _device.gpu_of_kind(compile_target.device_kind(self.target))
        plan = triton_plan("triton", shapes, gpu).kernels()
        asked = (launch_bytes(*kernel, shapes, gpu.capability) for kernel in plan.items())
        return max(asked), gpu.shared_memory

    def hops(self):
        """Of the halo."""
        return -(-self.model.window // self.chunk) if self.devices > 1 else 0

    def launched_once(self):
        """Those kernels of a ring that take a halo and a chunk in one launch, or are for a chunk.

        The others have one for each.
        """
        kernels = self.kernels()
        if SHORT in kernels:
            return kernels - {FORWARD}
        return kernels - {FORWARD} if FUSED in kernels and self.hops() == 1 else set()

    def is_short(self):
        """Whether the window is one of the fused kernel for short ones, which takes no halo."""
        window = self.model.window
        return window is not None and window + self.after <= 128 and max(self.model.dims) <= 64

    def rounds_within(self):
        """Whether the fused kernel rounds the gradients of queries."""
        ordered = self.implementation != "mosaic_gpu_nondeterministic"
        if not ordered or self.model.window is None or max(self.model.dims) > 128:
            return False
        halo = -(-self.model.window // KEY_TILE) * KEY_TILE
        long_halo = self.devices > 1 and not self.after and 2 * halo >= self.chunk
        return not self.segments and not long_halo

    def arguments(self, mesh):
        """Shapes of the arguments of `program`, cut over the mesh."""
        model = self.model

        def shape(*dims, dtype=self.dtype, axes=(None, "seq")):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*axes)))

        length = self.chunk * self.devices
        (heads, kv_heads), (dim, value_dim) = model.heads, model.dims
        q, k, v, dout = (
            shape(1, length, *dims)
            for dims in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim))
        )
        sink = shape(heads, dtype=jnp.float32, axes=()) if model.learned else None
        ids = shape(1, length, dtype=jnp.int32) if self.segments else None
        return q, k, v, sink, ids, dout

    def program(self, q, k, v, sink, ids, dout):
        """The output and all gradients; a window's keys come as a halo, however long it is."""
        windowed = self.devices > 1 and self.model.window is not None
        exchange = "halo" if windowed else self.exchange
        window = self.model.window if self.after == 0 else (self.model.window, self.after)

        def attend(q, k, v, sink):
            return rsj.ring_attention(
                q, k, v, window_size=window, num_sink_tokens=self.sinks,
                segment_ids=ids, sink_logits=sink, logits_soft_cap=self.model.softcap,
                exchange=exchange, implementation=self.implementation,
            )  # fmt: skip

        out, pull = jax.vjp(attend, q, k, v, sink)
        return out, pull(dout)

    def compile(self):
        """compile_target.Program of the output and all gradients."""
        arguments = self.arguments(compile_target.mesh(self.devices, self.target))
        return compile_target.compile_program(self.program, arguments, self.devices, self.target)


# Every kernel of the model table; the models left out differ in numbers of heads alone.
DISTINCT = ("mistral_7b", "phi3_mini", "gemma2_9b", "gemma3_4b", "gpt_oss", "mimo_v2_flash")
MISTRAL = MODELS["mistral_7b"]
SMALL = dataclasses.replace(MISTRAL, window=1000)
MODERNBERT = Model((12, 12), (64, 64), 64)

VARIANTS = {
    **{name: Variant(MODELS[name]) for name in (*DISTINCT, "mistral_7b_global")},
    **{f"{name}_ring": Variant(MODELS[name], devices=4) for name in DISTINCT},
    "mistral_7b_hops": Variant(MISTRAL, devices=4, chunk=2048),
    "sinks_segments": Variant(SMALL, sinks=4, segments=True),
    "sinks_segments_ring": Variant(SMALL, devices=4, sinks=4, segments=True),
    "float16": Variant(SMALL, dtype="float16"),
    "float32": Variant(SMALL, dtype="float32"),
    "both_sides_sinks_segments": Variant(SMALL, sinks=4, segments=True, after=500),
}
# Forward a ring launches what one device does, and a halo's launch.
BOTH = ("mistral_7b_ring", "phi3_mini", "mistral_7b_hops", "float16", "gpt_oss_ring")
BOTH += ("mimo_v2_flash_ring", "sinks_segments_ring")
MOSAIC = {name: VARIANTS[name] for name in BOTH} | {
    "segments": Variant(SMALL, segments=True),
    # A length that is no multiple of 8.
    "gpt_oss_segments": Variant(MODELS["gpt_oss"], segments=True, chunk=8189),
    # Heads of 256 that go on from partial results take the most shared memory.
    "gemma2_9b_hops": Variant(MODELS["gemma2_9b"], devices=4, chunk=2048),
    "gemma3_4b_sinks_segments": Variant(MODELS["gemma3_4b"], sinks=4, segments=True),
    "both_sides_ring": Variant(SMALL, devices=4, after=500),
    "both_sides_sinks_segments": Variant(SMALL, sinks=4, segments=True, after=500),
    "both_sides_segments_256": Variant(MODELS["gemma3_4b"], segments=True, after=512),
    "modernbert_segments": Variant(MODERNBERT, segments=True, after=64),
    "not_causal": Variant(MODELS["mistral_7b_global"], after=None),
}
VARIANTS |= {
    f"{name}_mosaic": dataclasses.replace(variant, implementation="mosaic_gpu")
    for name, variant in MOSAIC.items()
}
# In a process that has compiled a kernel it leaves no second dump: none above has these lengths.
VARIANTS["nondeterministic"] = dataclasses.replace(
    VARIANTS["mistral_7b_global"], implementation="mosaic_gpu_nondeterministic", chunk=4096
)
VARIANTS["default"] = Variant(MISTRAL, implementation=None, chunk=16384)

# What other GPUs get by default, with fewer heads; where a window reaches over the sequence it is
# none. No head size of theirs is left out, but the ring is one of heads of 128.
TARGETS = ("a100", "l4", "rtx_pro_6000", "b200")
ELSEWHERE = {
    "gpt_oss": VARIANTS["gpt_oss"],
    "phi3_mini": VARIANTS["phi3_mini"],
    "mistral_7b_global": VARIANTS["mistral_7b_global"],
    "window_beyond": Variant(MISTRAL, chunk=2048),
    "mimo_v2_flash": VARIANTS["mimo_v2_flash"],
    "gemma2_9b": VARIANTS["gemma2_9b"],
    "float32": VARIANTS["float32"],
    "float32_256": Variant(MODELS["gemma3_4b"], dtype="float32"),
    "sinks_segments": VARIANTS["sinks_segments"],
    "mistral_7b_ring": VARIANTS["mistral_7b_ring"],
}
VARIANTS |= {
    f"{name}_{target}": dataclasses.replace(variant, implementation=None, target=target)
    for target in TARGETS
    for name, variant in ELSEWHERE.items()
}
VARIANTS["float32_256"] = ELSEWHERE["float32_256"]
