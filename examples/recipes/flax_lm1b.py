"""Trains flax's lm1b example (Linen) for four steps: `python flax_lm1b.py FOLDER [--ours]`.

FOLDER is examples/lm1b of flax, with the lines of flax_lm1b.diff for `--ours`.
"""

import functools
import importlib
import sys

import jax
import optax
from flax.linen import partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from _batches import LENGTH, STEPS, VOCABULARY, packed, start


def main() -> None:
    """Prints the loss of each step."""
    args = start(__doc__)
    sys.path.insert(0, str(args.folder))
    train, models, utils, default = map(
        importlib.import_module, ("train", "models", "utils", "configs.default")
    )
    config = default.get_config()
    config.per_device_batch_size, config.max_target_length = 1, LENGTH
    if args.ours:
        config.ici_data_parallelism = config.ici_seq_parallelism = config.ici_tensor_parallelism = 2
    mesh = Mesh(utils.create_device_mesh(config), config.mesh_axes)
    jax.set_mesh(mesh)
    settings = models.TransformerConfig(
        vocab_size=VOCABULARY,
        output_vocab_size=VOCABULARY,
        emb_dim=32,
        num_heads=4,
        num_layers=2,
        qkv_dim=32,
        mlp_dim=64,
        max_len=LENGTH,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
    )
    state, shardings = utils.setup_initial_state(
        models.TransformerLM(settings), optax.adamw(1e-2), config, jax.random.key(0), mesh
    )
    cut = NamedSharding(mesh, PartitionSpec(config.data_sharding))
    train_step = jax.jit(
        functools.partial(
            train.train_step,
            config=settings,
            learning_rate_fn=lambda step: 1e-2,
            dropout_rng=jax.random.key(1),
        ),
        in_shardings=(shardings, cut),
        out_shardings=(shardings, None),
    )
    with partitioning.axis_rules(config.logical_axis_rules):
        for step in range(STEPS):
            state, metrics = train_step(state, packed(step))
            print(f"loss {float(metrics['loss'] / metrics['denominator']):.7f}")


if __name__ == "__main__":
    main()
