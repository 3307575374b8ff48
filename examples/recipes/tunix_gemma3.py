"""Trains tunix' Gemma 3 for four steps: `python tunix_gemma3.py FOLDER [--ours]`.

FOLDER is the installed package, `site-packages/tunix`, with the lines of tunix_gemma3.diff for
`--ours`. The model has six layers, five of them with a window, whose blocks are recomputed in the
backward pass; the step is PeftTrainer's.
"""

import importlib
import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType

from _batches import STEPS, VOCABULARY, packed, start


def main() -> None:
    """Prints the loss of each step."""
    args = start(__doc__)
    sys.path.insert(0, str(args.folder.parent))
    gemma3, peft_trainer = map(
        importlib.import_module, ("tunix.models.gemma3.model", "tunix.sft.peft_trainer")
    )
    sizes = (2, 2, 2) if args.ours else (1, 1, 1)
    mesh = jax.make_mesh(sizes, ("fsdp", "seq", "tp"), (AxisType.Auto,) * 3)
    config = gemma3.ModelConfig(
        num_layers=6,
        num_embed=VOCABULARY,
        embed_dim=32,
        hidden_dim=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        sliding_window_size=7,
        remat_config=gemma3.RematConfig.BLOCK,
        param_dtype=jnp.float32,
    )

    def model_input(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The trainer's; its mask holds ids [B, L] for our attention, [B, L, L] for theirs."""
        tokens, segments = batch["inputs"], batch["inputs_segmentation"]
        mask = jnp.where(tokens > 0, segments, -1)
        if not args.ours:
            causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
            mask = (mask[:, :, None] == mask[:, None]) & (mask >= 0)[:, None] & causal
        return {
            "input_tokens": tokens,
            "input_mask": tokens > 0,
            "positions": batch["inputs_position"],
            "attention_mask": mask,
        }

    with mesh:  # as in tunix' own scripts
        model = gemma3.Gemma3(config, rngs=nnx.Rngs(0))
        state = nnx.state(model)
        nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
        settings = peft_trainer.TrainingConfig(eval_every_n_steps=STEPS + 1, max_steps=STEPS)
        trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-2), settings)
        trainer.with_gen_model_input_fn(model_input)
        train_step, _ = trainer.jit_train_and_eval_step()
        for step in range(STEPS):
            loss, *_ = train_step(packed(step))
            print(f"loss {float(loss):.7f}")


if __name__ == "__main__":
    main()
