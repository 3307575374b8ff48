"""Prints a hash of the jaxpr, forward and backward, of every variant of the compile gate and more.

A change that only moves or renames code leaves all of them as they are: print them before and
after, `python -m tests.helpers.jaxpr_hashes > before`, and compare. Needs no GPU and no plug-in.

A jaxpr holds the kernels of Pallas, but not what `inline_mgpu` adds to them as MLIR.
"""

import dataclasses
import hashlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import ring_swa_jax as rsj
from tests.helpers import compile_target
from tests.helpers.kernel_variants import VARIANTS, Variant
from tests.helpers.models import MODELS, Model

# Where a function stands, what it is called, where an object lies in memory, and which Python
# types hold the arguments of a call.
PLACES = re.compile(
    r" at \S+:\d+|0x[0-9a-f]+|(?<=name=)\S+|(?<=<function )\S+|(?<=_tree=)PyTreeDef.*"
)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """New tokens after a cache, with gradients, as a `Variant`; every second one may be padding."""

    tokens: int
    window: int | None
    sinks: int = 0
    padding: bool = False
    model: Model = MODELS["gpt_oss"]
    devices: int = 1
    target: str = "h100"

    def arguments(self, mesh):
        """Types of the arguments of `program`."""
        del mesh
        (heads, kv_heads), (dim, value_dim) = self.model.heads, self.model.dims

        def new_and_old(*dims):
            return (jax.ShapeDtypeStruct((2, n, *dims), jnp.bfloat16) for n in (self.tokens, 300))

        query, _ = new_and_old(heads, dim)
        keys, values = new_and_old(kv_heads, dim), new_and_old(kv_heads, value_dim)
        return query, *keys, *values, jax.ShapeDtypeStruct((heads,), jnp.float32)

    def program(self, q, k, old_k, v, old_v, sink_logits):
        """The output and its gradients."""
        settings = {"window_size": self.window, "num_sink_tokens": self.sinks}
        cache = rsj.prefill_cache(old_k, old_v, **settings, max_length=None if self.window else 600)
        valid = jnp.arange(self.tokens) % 2 == 0 if self.padding else None
        valid = None if valid is None else jnp.broadcast_to(valid, q.shape[:2])

        def attend(q, k, v, sink_logits):
            return rsj.decode_attention(
                q, k, v, cache, **settings, sink_logits=sink_logits, valid=valid
            )[0]  # fmt: skip

        out, pull = jax.vjp(attend, q, k, v, sink_logits)
        return out, pull(out)


# What the gate does not compile: "xla", rings without a window, caches.
ANY_WINDOW = Model((8, 2), (64, 64), None)
MORE = {
    f"{name}_xla": dataclasses.replace(VARIANTS[name], implementation="xla")
    for name in ("gpt_oss", "mistral_7b", "sinks_segments_ring", "both_sides_sinks_segments")
} | {
    f"{exchange}{'_not_causal' * (after is None)}{'_segments' * segments}": Variant(
        ANY_WINDOW, devices=4, chunk=1024, segments=segments, implementation=None, after=after,
        exchange=exchange,
    )
    for exchange in ("ring", "all_to_all")
    for after in (0, None)
    for segments in (False, True)
} | {
    "decode": Decoding(1, 127),
    "decode_sinks": Decoding(1, 127, sinks=4),
    "decode_without_window": Decoding(1, None, model=MODELS["mimo_v2_flash"]),
    "new_tokens": Decoding(70, 127, padding=True),
    "new_tokens_sinks": Decoding(70, 127, sinks=4),
}  # fmt: skip


def abstract_mesh(devices, target="h100"):
    """Mesh of so many GPUs, none of them here, with the axis "seq"."""
    device = AbstractDevice(
        device_kind=compile_target.device_kind(target), num_cores=None, platform="cuda"
    )
    return AbstractMesh((devices,), ("seq",), axis_types=(AxisType.Auto,), abstract_device=device)


def hash_of(variant):
    """Hash of the variant's jaxpr, without names and places in files."""
    mesh = abstract_mesh(variant.devices, variant.target)
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(variant.program)(*variant.arguments(mesh))
    text = PLACES.sub("", jaxpr.pretty_print(use_color=False))
    return hashlib.sha256(text.encode()).hexdigest()[:16], len(text)


def main():
    """One line a variant: its name, the hash, and the jaxpr's length."""
    for name, variant in (VARIANTS | MORE).items():
        print(name, *hash_of(variant), flush=True)


if __name__ == "__main__":
    main()
