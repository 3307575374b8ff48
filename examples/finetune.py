"""Continues the training of a checkpoint of Hugging Face, its sequence cut over several devices.

    python examples/make_tiny_checkpoint.py gemma3 tiny
    python examples/finetune.py tiny/checkpoint tiny/documents.npz --output tiny/finetuned

The first command makes a tiny random model and documents, so that the second one runs offline.
Gemma 3 and gpt-oss are here. Settings and weights of the attention layers come from config.json and
the safetensors through `settings_from_hugging_face` and `weights_from_hugging_face`. Documents are
packed one after the other into long sequences, which are cut over 8 CPU devices that this script
sets up, or over the GPUs where there are some. The folder that it writes has the same files, names
and dtypes; transformers loads it.
"""

import argparse
import math
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import pallas_kernels

from _hugging_face.checkpoint import Checkpoint
from _hugging_face.decoder import Decoder, Parameters, create_decoder
from _hugging_face.documents import NO_TARGET, Batch, packed, read_documents

Loss = Callable[[Parameters, jax.Array, jax.Array, jax.Array], jax.Array]
# How many batches of held-out documents the loss is measured on.
_HELD_OUT_BATCHES = 2


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"
    parser.add_argument(
        "checkpoint", type=pathlib.Path, help="a folder with config.json and *.safetensors"
    )
    parser.add_argument(
        "documents", type=pathlib.Path, help="an .npz file with an array of tokens for each"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, required=True, help="the folder to write, another one"
    )

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=20, help=default)
    group.add_argument(
        "--sequence-length", type=int, default=8192, help=f"over all devices {default}"
    )
    group.add_argument("--batch-size", type=int, default=1, help=f"sequences in a step {default}")
    group.add_argument("--learning-rate", type=float, default=3e-3, help=f"at its peak {default}")
    group.add_argument("--seed", type=int, default=0, help=f"of the documents' order {default}")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help=f"of the computation; parameters are float32 {default}",
    )

    group = parser.add_argument_group("devices")
    group.add_argument("--devices", type=int, help="how many (default: all GPUs, or 8 CPU devices)")
    group.add_argument(
        "--data", type=int, default=1, help=f"in how many parts the batch is cut {default}"
    )
    group.add_argument(
        "--implementation",
        choices=pallas_kernels.IMPLEMENTATIONS,
        help="of the attention (default: the best for the device)",
    )
    args = parser.parse_args(arguments)
    for name in ("steps", "sequence_length", "batch_size", "data"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least one")
    if args.devices is not None and args.devices < 1:
        parser.error(f"--devices {args.devices}: at least one")
    if args.output.resolve() == args.checkpoint.resolve():
        parser.error(f"--output {args.output}: the checkpoint's own folder; name another one")
    return args


def set_up_mesh(args: argparse.Namespace) -> Mesh:
    """A mesh ("data", "seq") of the devices.

    Raises:
        ValueError: too few devices, or sizes that they do not divide.
    """
    # This must come before JAX looks at its devices for the first time.
    jax.config.update("jax_num_cpu_devices", args.devices or 8)
    number = args.devices or jax.device_count()
    if number > jax.device_count():
        raise ValueError(f"--devices {number}, but there are {jax.device_count()}")
    for what, size in (("devices", number), ("sequences of --batch-size", args.batch_size)):
        if size % args.data:
            raise ValueError(f"--data {args.data} does not divide the {size} {what}")
    seq = number // args.data
    if args.sequence_length % seq:
        raise ValueError(f"{seq} devices do not divide --sequence-length {args.sequence_length}")
    return make_mesh(args.data, seq)


def make_mesh(data: int, seq: int) -> Mesh:
    """The first devices; the compiler distributes everything but the attention ("Auto")."""
    devices = jax.devices()[: data * seq]
    return jax.make_mesh((data, seq), ("data", "seq"), (AxisType.Auto,) * 2, devices=devices)


def loss_of(decoder: Decoder) -> Loss:
    """Mean cross entropy in nats, over the tokens that have a target."""

    def loss(
        parameters: Parameters, tokens: jax.Array, targets: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        logits = decoder(parameters, tokens, segment_ids)
        has_target = targets != NO_TARGET
        labels = jnp.where(has_target, targets, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses, where=has_target) / jnp.maximum(has_target.sum(), 1)

    return loss


class Trainer:
    """Parameters and optimizer on the devices of a mesh, and the compiled step."""

    def __init__(self, loss: Loss, parameters: Parameters, mesh: Mesh, args: argparse.Namespace):
        schedule = optax.warmup_cosine_decay_schedule(
            args.learning_rate / 10, args.learning_rate, args.steps // 10, args.steps
        )
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
        self.mesh, everywhere = mesh, NamedSharding(mesh, PartitionSpec())
        self.parameters = jax.device_put(parameters, everywhere)
        self.state = jax.jit(optimizer.init, out_shardings=everywhere)(self.parameters)

        def step(parameters, state, *batch):
            value, gradients = jax.value_and_grad(loss)(parameters, *batch)
            updates, state = optimizer.update(gradients, state, parameters)
            return value, optax.apply_updates(parameters, updates), state

        self._step = jax.jit(step, donate_argnums=(0, 1), out_shardings=everywhere)

    def step(self, batch: Batch) -> float:
        """Improves the parameters; returns the loss that they had before."""
        with jax.set_mesh(self.mesh):
            loss, self.parameters, self.state = self._step(
                self.parameters, self.state, *put(batch, self.mesh)
            )
        return float(loss)


def evaluate(loss: Loss, parameters: Parameters, batches: Sequence[Batch], mesh: Mesh) -> float:
    """The mean loss of some batches."""
    parameters = jax.device_put(parameters, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        losses = [float(loss(parameters, *put(batch, mesh))) for batch in batches]
    return sum(losses) / len(losses)


def compare_devices(
    loss: Loss, parameters: Parameters, batches: Sequence[Batch], mesh: Mesh, dtype: str
) -> None:
    """How many devices share a sequence must not matter beyond rounding."""
    together = evaluate(loss, parameters, batches, mesh)
    alone = evaluate(loss, parameters, batches, make_mesh(1, 1))
    print(f"held-out loss: {together:.6f} on {mesh.size} devices, {alone:.6f} on one device")
    if not math.isclose(together, alone, rel_tol=1e-4 if dtype == "float32" else 1e-2):
        raise SystemExit("the loss must not depend on the devices")


def put(batch: Batch, mesh: Mesh) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts a batch over the devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data", "seq"))
    tokens, targets, segment_ids = (jax.device_put(x, sharding) for x in batch)
    return tokens, targets, segment_ids


def train(trainer: Trainer, batches: Iterator[Batch], steps: int) -> list[float]:
    """Trains; returns the loss of every step."""
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for step, batch in zip(range(steps), batches, strict=False):
            losses.append(trainer.step(batch))
            if step == 0:
                start = time.perf_counter()  # do not count the time that the compiler took
                status = f"loss {losses[-1]:.3f}"
            else:
                speed = step * batch.tokens.size / (time.perf_counter() - start)
                status = f"loss {losses[-1]:.3f}, {speed:,.0f} tokens/s"
            bar.set_postfix_str(status, refresh=False)
            bar.update()
    return losses


def read(
    args: argparse.Namespace,
) -> tuple[Checkpoint, Decoder, Parameters, list[np.ndarray]]:
    """The checkpoint, its decoder with parameters, and documents.

    Raises:
        ValueError: files that are missing, or do not fit together.
        NotImplementedError: a model that is not here.
        OSError: a folder that cannot be written to.
    """
    checkpoint = Checkpoint.read(args.checkpoint)
    settings = {"batch_axis": "data", "implementation": args.implementation}
    decoder = create_decoder(checkpoint.config, dtype=args.dtype, **settings)
    parameters = checkpoint.parameters(decoder)
    documents = read_documents(args.documents, parameters.vocabulary)
    args.output.mkdir(parents=True, exist_ok=True)
    return checkpoint, decoder, parameters, documents


def describe(
    checkpoint: Checkpoint, decoder: Decoder, mesh: Mesh, args: argparse.Namespace
) -> None:
    """Prints what is trained, and on what."""
    layers = ", ".join(
        f"{n} {kind} (window_size={decoder.model_layers.kinds[kind]['window_size']})"
        for kind, n in Counter(decoder.model_layers.layers).items()
    )
    size = sum(tensor.size for tensor in checkpoint.tensors.values())
    kind = mesh.devices.flat[0].device_kind
    print(f"checkpoint: {checkpoint.config['model_type']}, {size:,} parameters, layers: {layers}")
    print(
        f"sequences: {args.sequence_length:,} tokens over {mesh.shape['seq']} devices ({kind}), "
        f"{args.batch_size} in a step over {mesh.shape['data']}"
    )


def main() -> None:
    """The whole job: read, train, write, and read again what was written."""
    args = parse_arguments()
    try:
        mesh = set_up_mesh(args)
        checkpoint, decoder, parameters, documents = read(args)
    except (ValueError, NotImplementedError, OSError) as error:
        raise SystemExit(f"finetune.py: error: {error}") from error
    describe(checkpoint, decoder, mesh, args)
    packing = {
        "batch_size": args.batch_size,
        "sequence_length": args.sequence_length,
        "seed": args.seed,
    }
    every = max(2, min(20, len(documents)))  # of these documents one is held out
    held_out = packed(documents[::every], **packing)
    unseen = [next(held_out) for _ in range(_HELD_OUT_BATCHES)]
    kept = [document for i, document in enumerate(documents) if i % every]

    loss = jax.jit(loss_of(decoder))
    try:
        compare_devices(loss, parameters, unseen, mesh, args.dtype)
    except NotImplementedError as error:  # what the implementation asked for cannot do here
        raise SystemExit(f"finetune.py: error: {error}") from error
    trainer = Trainer(loss, parameters, mesh, args)
    losses = train(trainer, packed(kept, **packing), args.steps)
    print(f"training: loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")

    after = evaluate(loss, trainer.parameters, unseen, mesh)
    checkpoint.write(args.output, decoder, jax.device_get(trainer.parameters))
    written = Checkpoint.read(args.output).parameters(decoder)
    read_again = evaluate(loss, written, unseen, mesh)
    print(f"held-out loss: {after:.6f}, and {read_again:.6f} of what {args.output} holds")


if __name__ == "__main__":
    main()
