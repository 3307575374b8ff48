"""Memory that a layer keeps for the backward pass, with and without checkpointing.

``python -m benchmarks.remat`` compiles the gradient of Flax layers under `nnx.scan`, over eight
CPU devices, and prints by how much a layer more enlarges what a device allocates.
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_swa_jax import Rope
from ring_swa_jax.nnx import RingSlidingWindowAttention

POLICIES = {
    "no checkpointing": jax.checkpoint_policies.everything_saveable,
    'only "context"': jax.checkpoint_policies.save_only_these_names("context"),
    "nothing": jax.checkpoint_policies.nothing_saveable,
}
FEATURES, HEADS, KV_HEADS, HEAD_DIM = 256, 8, 2, 32


def kept(policy: str, window: int | None, *, chunk: int, devices: int) -> float:
    """Bytes of one layer on one device."""
    few, many = (_temporary(policy, window, chunk, devices, layers) for layers in (4, 8))
    return (many - few) / 4


def _temporary(policy, window, chunk, devices, layers) -> float:
    """Bytes that the compiled gradient allocates on one device."""
    mesh = jax.make_mesh(
        (devices,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )

    @nnx.vmap(in_axes=0)
    def create(rngs):
        return RingSlidingWindowAttention(
            HEADS,
            FEATURES,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            window_size=window,
            rope=Rope(),
            rngs=rngs,
        )

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat(policy=POLICIES[policy])
    def apply(layer, x):
        return x + layer(x)

    graph, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0).split(layers))))

    def loss(state, x):
        return (apply(nnx.merge(graph, state), x) ** 2).mean()

    sharding = NamedSharding(mesh, P(None, "seq"))
    x = jax.ShapeDtypeStruct((1, chunk * devices, FEATURES), jnp.float32, sharding=sharding)
    with jax.set_mesh(mesh):
        analysis = jax.jit(jax.grad(loss)).lower(state, x).compile().memory_analysis()
    return float("nan") if analysis is None else analysis.temp_size_in_bytes


def main() -> None:
    """Prints a line a window and number of devices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--windows", type=int, nargs="*", default=[0, 1023, 4095])
    parser.add_argument("--devices", type=int, nargs="*", default=[4, 8])
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(arguments.devices))
    print(f"jax {jax.__version__}, {arguments.chunk} tokens on each device, float32, KiB a layer")
    print(f"{FEATURES} features, {HEADS} query heads, {KV_HEADS} key/value heads of {HEAD_DIM}")
    print("window devices " + "".join(f"{policy:>18}" for policy in POLICIES))
    for window in arguments.windows:
        for devices in arguments.devices:
            sizes = (
                kept(policy, window, chunk=arguments.chunk, devices=devices) for policy in POLICIES
            )
            row = "".join(f"{size / 1024:18.1f}" for size in sizes)
            print(f"{window:6d} {devices:7d} {row}", flush=True)


if __name__ == "__main__":
    main()
