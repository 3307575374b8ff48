"""Trains flax's gemma example for four steps: `python flax_gemma.py FOLDER [--ours]`.

FOLDER is examples/gemma of flax, with the lines of flax_gemma.diff for `--ours`. The model has a
layer with a window, one without, norms of queries and keys, and a soft cap; its mesh is Explicit.
"""

import importlib
import sys

import jax
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from _batches import STEPS, VOCABULARY, packed, start


def main() -> None:
    """Prints the loss of each step."""
    args = start(__doc__)
    sys.path.insert(0, str(args.folder))
    train, transformer, settings = map(
        importlib.import_module, ("train", "transformer", "transformer_cfg")
    )
    # As in train.py, whose axes are Explicit by default.
    mesh = (
        jax.make_mesh((2, 2, 2), ("fsdp", "seq", "tensor"))
        if args.ours
        else jax.make_mesh((1, 1), ("fsdp", "tensor"))
    )
    cut = NamedSharding(mesh, PartitionSpec("fsdp"))
    kinds = settings.AttentionType
    config = settings.TransformerConfig(
        num_layers=2,
        num_embed=VOCABULARY,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        attention_types=(kinds.LOCAL_SLIDING, kinds.GLOBAL),
        sliding_window_size=7,
        attn_logits_soft_cap=20.0,
        final_logit_softcap=30.0,
        use_qk_norm=True,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        shd_config=settings.ShardingConfig.fsdp_tp_sharding(tensor_parallel_axis_name="tensor"),
    )
    with jax.set_mesh(mesh):
        rngs = nnx.Rngs(0)
        model = transformer.Transformer(config, rngs=rngs)
        optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
        train_step = jax.jit(train.jax_train_step)
        for step in range(STEPS):
            metrics = nnx.MultiMetric(
                loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy()
            )
            batch = {name: jax.device_put(x, cut) for name, x in packed(step).items()}
            updates, _ = train_step(model, optimizer, rngs, batch, metrics)
            nnx.update((model, optimizer, rngs, metrics), updates)
            print(f"loss {float(metrics.compute()['loss']):.7f}")


if __name__ == "__main__":
    main()
