"""Trains MaxText's Gemma 2 for four steps: `python maxtext_gemma2.py FOLDER [--ours] [--stages 2]`.

FOLDER is `src/maxtext` of MaxText, with the lines of maxtext_gemma2.diff for `--ours`. Its layers
have a window or none, and soft caps. MaxText's training loop runs as it is, its load balancing
included; only the data are ours. With two stages the layers are a pipeline.
"""

import importlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from _batches import LENGTH, ROWS, STEPS, VOCABULARY, make_parser, packed

MODEL = {
    "decoder_block": "gemma2",
    "base_num_decoder_layers": 2,  # each of two attention layers, a local and a global one
    "base_emb_dim": 32,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 16,
    "base_mlp_dim": 64,
    "vocab_size": VOCABULARY,
    "sliding_window_size": 8,
    "attn_logits_soft_cap": 20.0,
    "final_logits_soft_cap": 30.0,
    "logits_via_embedding": True,
    "dtype": "float32",
}
RUN = {
    "run_name": "recipe",
    "hardware": "cpu",
    "attention": "dot_product",
    "dataset_type": "synthetic",
    "steps": STEPS,
    "learning_rate": 1e-2,
    "warmup_steps_fraction": 0.0,
    "enable_dropout": False,
    "enable_checkpointing": False,
    "skip_jax_distributed_system": True,
    "sharding_tolerance": 1.0,
    "max_target_length": LENGTH,
    "log_config": False,
}


def settings(args: Any) -> dict[str, Any]:
    """How the devices are used: all of the batch at once, whatever their number."""
    found = {"per_device_batch_size": ROWS / jax.device_count(), "ici_fsdp_parallelism": 1}
    if args.ours:
        axes = ("context", "tensor") if args.stages > 1 else ("fsdp", "context", "tensor")
        found |= {f"ici_{axis}_parallelism": 2 for axis in axes}
    if args.stages > 1:
        found["ici_pipeline_parallelism"] = args.stages
    return found


def main() -> None:
    """Prints the loss of each step."""
    parser = make_parser(__doc__)
    parser.add_argument("--stages", type=int, default=1, help="of a pipeline")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8 if args.ours else args.stages)
    sys.path.insert(0, str(args.folder.parent))
    pyconfig = importlib.import_module("maxtext.configs.pyconfig")
    train = importlib.import_module("maxtext.trainers.pre_train.train")
    sharding = importlib.import_module("maxtext.utils.sharding")
    interface: Any = importlib.import_module("maxtext.input_pipeline.input_pipeline_interface")

    def batches(config: Any, mesh: Mesh) -> tuple[Iterator[dict[str, jax.Array]], None]:
        where = sharding.get_input_data_sharding(config, mesh)

        def generate() -> Iterator[dict[str, jax.Array]]:
            for step in range(STEPS + 1):
                batch = packed(step)
                for name in ("position", "segmentation"):
                    batch[f"targets_{name}"] = batch[f"inputs_{name}"]
                yield {name: jax.device_put(x, where) for name, x in batch.items()}

        return generate(), None

    interface.create_data_iterator = batches
    with tempfile.TemporaryDirectory() as place:
        metrics = pathlib.Path(place, "metrics")
        values = MODEL | RUN | settings(args)
        values |= {"base_output_directory": place, "metrics_file": metrics}
        flags = [f"{name}={value}" for name, value in values.items()]
        config = pyconfig.initialize(["", str(args.folder / "configs" / "base.yml"), *flags])
        train.run(config, recorder=None)
        for line in metrics.read_text().splitlines():
            print(f"loss {json.loads(line)['learning/loss']:.7f}")


if __name__ == "__main__":
    main()
