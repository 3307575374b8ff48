"""Trains a small language model on real text, its sequence cut over several devices.

    python examples/train_lm.py

The text is the source code of Python's own standard library: documents packed one after the other
into long sequences. The model's layers look at a sliding window plus the first tokens ("sinks") of
the same document. The sequence is cut over 8 CPU devices that this script sets up, or over the GPUs
where there are some; with --data 2, two halves of the batch are cut over half of the devices each.

Ctrl-C ends a run as its last step would: with a checkpoint, the loss curve and a sample. Go on,
on as many devices as there are now, and sample more, with

    python examples/train_lm.py --resume runs/TIME
    python examples/sample.py runs/TIME

--model gpt-oss-like and --model gemma-like mix layers with a window and layers that look at the
whole document, one to one (with learned sinks) and five to one (with norms of queries and keys).

Several processes, each started with the same flags (--devices counts those of all processes):

    python examples/train_lm.py --coordinator 127.0.0.1:4711 --num-processes 2 --process-id 0 &
    python examples/train_lm.py --coordinator 127.0.0.1:4711 --num-processes 2 --process-id 1

On a cluster of GPUs that JAX knows (SLURM, Kubernetes, ...) --distributed finds these by itself.
"""

import argparse
import dataclasses
import math
import zlib

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ring_swa_jax import check_processes

from _checkpoint import Checkpoints, RunFolder
from _data import Batch, Corpus, PackedStream, load_corpus, unigram_entropy
from _devices import cut, make_mesh, on_one_device, one_device_mesh, replicated, start_jax
from _flags import check, folder_of, make_parser, settings_of
from _log import Log, plot, read_series
from _sampling import continue_text
from _settings import Settings
from _tokenizer import BytePairs
from _training import Trainer, create_model, create_optimizer, evaluate

# Files of four are enough to learn frequent pairs from, and quicker.
TOKENIZER_SHARE = 4
HELD_OUT_BATCHES = 1


def learn_tokenizer(corpus: Corpus, settings: Settings) -> BytePairs:
    """Byte pairs of the text that is trained on."""
    return BytePairs.train(corpus.train[::TOKENIZER_SHARE], settings.vocabulary)


def streams(
    corpus: Corpus, tokenizer: BytePairs, settings: Settings
) -> tuple[PackedStream, list[Batch]]:
    """The stream to train on, and batches of held-out files."""
    options = {"document_length": settings.document_length, "seed": settings.seed}
    unseen = PackedStream(corpus.held_out, tokenizer, **options)
    shape = settings.batch_size, settings.sequence_length
    held_out = [unseen.batch(i * math.prod(shape), *shape) for i in range(HELD_OUT_BATCHES)]
    return PackedStream(corpus.train, tokenizer, **options), held_out


def describe(settings: Settings, corpus: Corpus, model: nnx.Module, mesh: Mesh) -> None:
    """Prints what is trained on what, where."""
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    kind = mesh.devices.flat[0].device_kind
    characters = sum(map(len, corpus.train))
    print(f"text: {characters:,} characters in {len(corpus.train)} files")
    print(
        f"model: {settings.model}, {settings.layers} layers, {parameters:,} parameters, "
        f"window {settings.window}"
    )
    lengths = f"{settings.sequence_length:,} tokens"
    if settings.short_steps:
        lengths = f"{settings.short_length:,} tokens, {lengths} from step {settings.short_steps} on"
    print(
        f"sequence: {lengths}, over {mesh.shape['seq']} devices ({kind}); "
        f"batch: {settings.batch_size}, over {mesh.shape['data']}"
    )


def compare_with_one_device(trainer: Trainer) -> None:
    """The first loss on the mesh and on one device: how many there are must not matter."""
    batch, mesh = trainer.batch(0), one_device_mesh()
    with jax.set_mesh(trainer.mesh), trainer.compiling("the first loss"):
        together = float(evaluate(trainer.model, *batch.put(cut(trainer.mesh))))
    with jax.set_mesh(mesh), trainer.compiling("the first loss for one device"):
        alone = float(evaluate(on_one_device(trainer.model), *batch.put(cut(mesh))))
    number = trainer.mesh.size
    if jax.process_index() == 0:
        print(f"first loss: {together:.6f} on {number} devices, {alone:.6f} on one device")
    if not math.isclose(together, alone, rel_tol=1e-4):
        raise SystemExit(f"the loss on {number} devices, {together}, is not that on one, {alone}")


def beginning(text: str) -> str:
    """A text as far as the name of its first `__init__`, or its first 400 characters."""
    name = "    def __init__("
    place = text.find(name, 0, 6000)
    return text[:400] if place < 0 else text[: place + len(name)]


def finish(
    trainer: Trainer, folder: RunFolder, corpus: Corpus, args: argparse.Namespace, step: int
) -> None:
    """Evaluates, draws the loss curve and samples."""
    with jax.set_mesh(trainer.mesh):
        loss = trainer.evaluate(step)
    if jax.process_index() > 0:
        return
    tokenizer = folder.tokenizer()
    targets = np.concatenate([batch.targets[batch.targets >= 0] for batch in trainer.held_out])
    per_byte = loss * targets.size / tokenizer.bytes_of_tokens[targets].sum()
    entropy = unigram_entropy(targets)
    losses = list(read_series(folder.log, "loss").values())
    print(f"loss: {losses[0]:.6f} at first, {losses[-1]:.6f} at last, in nats per token")
    print(f"held-out files: {loss:.3f} nats per token ({per_byte:.3f} per byte)", end="")
    print(f", unigram entropy: {entropy:.3f}")
    output = args.output or folder.curve
    plot(folder.log, entropy, output)
    print(f"loss curve: {output}")
    name, text = corpus.held_out_names[-1], beginning(corpus.held_out[-1])
    shown = "\n".join(text.splitlines()[-8:])
    print(f"\n--- {name}, a held-out file, as far as the model reads it ---\n{shown}")
    print("--- and the model goes on ---")
    settings = args.sample_length, args.temperature, trainer.settings.seed
    more = continue_text(trainer.model, tokenizer, text, *settings)
    print(shown.splitlines()[-1] + more)
    done = step == trainer.settings.steps
    script = "sample.py" if done else "train_lm.py --resume"
    print(f"\n{'more' if done else 'go on'}: python examples/{script} {folder.path}")


def main() -> None:
    """The whole job: data, training, evaluation, loss curve and sample."""
    parser = make_parser(__doc__)
    args = parser.parse_args()
    check(parser, args)
    try:
        devices = start_jax(args)
        settings = settings_of(args, devices)
        corpus = load_corpus(settings.text)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    mesh = make_mesh(args.data, devices // args.data)
    folder = folder_of(args)
    tokenizer = folder.tokenizer() if args.resume else learn_tokenizer(corpus, settings)
    # Wrong numbers would be the price of processes that differ.
    check_processes(
        mesh, **dataclasses.asdict(settings), tokenizer=zlib.crc32(tokenizer.json.encode())
    )
    first_process = jax.process_index() == 0
    if first_process and not args.resume:
        folder.create(settings, tokenizer)

    model = create_model(settings, tokenizer.size, args.implementation, mesh)
    optimizer = create_optimizer(settings, model, mesh)
    checkpoints = Checkpoints(folder)
    first = max(checkpoints.steps(), default=0)
    if first:
        checkpoints.restore(first, replicated(mesh), model=model, optimizer=optimizer)
    training, held_out = streams(corpus, tokenizer, settings)
    trainer = Trainer(
        settings, model, optimizer, mesh, training, held_out, checkpoints,
        Log(folder.log, writes=first_process), args.checkpoint_every, args.evaluate_every,
    )  # fmt: skip
    # Every process does the same work; only the first one speaks of it.
    if first_process:
        describe(settings, corpus, model, mesh)
        print(f"folder: {folder.path}" + (f", from step {first} on" if first else ""))
    if not first:
        compare_with_one_device(trainer)
    step = trainer.run(first)
    finish(trainer, folder, corpus, args, step)
    checkpoints.close()


if __name__ == "__main__":
    main()
