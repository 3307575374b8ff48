"""Trains a small language model on real text, its sequence cut over several devices.

    python examples/train_lm.py

The text is the source code of Python's own standard library: documents packed one after the other
into sequences of 16384 bytes. The model is a byte-level Transformer whose layers look at a sliding
window plus the first tokens ("sinks") of the same document. The sequence is cut over 8 CPU devices
that this script sets up, or over the GPUs where there are some.

--model gpt-oss-like and --model gemma-like mix layers with a window and layers that look at the
whole document, one to one (with learned sinks) and five to one (with norms of queries and keys).

Several processes, each started with the same flags (--devices counts those of all processes):

    python examples/train_lm.py --coordinator 127.0.0.1:4711 --num-processes 2 --process-id 0 &
    python examples/train_lm.py --coordinator 127.0.0.1:4711 --num-processes 2 --process-id 1

On a cluster of GPUs that JAX knows (SLURM, Kubernetes, ...) --distributed finds these by itself.
"""

import argparse
import math
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import pallas_kernels
from ring_swa_jax import check_processes

from _data import BEGIN, Batch, load_corpus, packed_batches, shard
from _model import ByteTransformer, loss_fn, patterns, sample


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=70, help=default)
    group.add_argument(
        "--sequence-length", type=int, default=16384, help=f"over all devices {default}"
    )
    group.add_argument("--batch-size", type=int, default=1, help=f"sequences in a step {default}")
    group.add_argument(
        "--document-length", type=int, default=8192, help=f"longer files are cut up {default}"
    )
    group.add_argument("--learning-rate", type=float, default=4e-3, help=f"at its peak {default}")
    group.add_argument(
        "--seed", type=int, default=0, help=f"of parameters, data and sampling {default}"
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=patterns(0), default="sliding-window", help=f"its kind {default}"
    )
    group.add_argument(
        "--window",
        type=int,
        default=127,
        help=f"bytes that a local layer looks back, besides the byte itself {default}",
    )
    group.add_argument(
        "--sinks",
        type=int,
        help="first bytes of its document that every byte sees besides, in layers with a window "
        "(default: 4 in sliding-window, else 0)",
    )
    group.add_argument(
        "--layers", type=int, help="(default: 3, 4 in gpt-oss-like, 6 in gemma-like)"
    )

    group = parser.add_argument_group("devices")
    group.add_argument("--devices", type=int, help="how many (default: all GPUs, or 8 CPU devices)")
    group.add_argument(
        "--implementation",
        choices=pallas_kernels.IMPLEMENTATIONS,
        help="of the attention (default: the best for the device)",
    )
    group.add_argument("--coordinator", help="several processes: host:port of process 0")
    group.add_argument("--num-processes", type=int, help="how many there are")
    group.add_argument("--process-id", type=int, help="which of them this is, from 0")
    group.add_argument("--distributed", action="store_true", help="find these three by itself")

    group = parser.add_argument_group("at the end")
    group.add_argument("--output", default="train_lm.png", help=f"the loss curve {default}")
    group.add_argument("--sample-length", type=int, default=300, help=f"in bytes {default}")
    group.add_argument("--temperature", type=float, default=0.7, help=f"of the sample {default}")
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: at least one")
    length = len(patterns(args.window)[args.model])
    if args.layers is None:
        args.layers = -(-3 // length) * length
    if args.layers < 1 or args.layers % length:
        parser.error(f"--layers {args.layers}: {args.model} needs a multiple of {length}")
    return args


def set_up_mesh(args: argparse.Namespace) -> Mesh:
    """Starts JAX, in several processes if asked for; returns a mesh of the devices of all."""
    # This must come before JAX looks at its devices for the first time.
    if args.coordinator or args.distributed:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    cpus, processes = args.devices or 8, args.num_processes or 1
    if cpus % processes:
        raise SystemExit(f"--devices {cpus} is not a multiple of --num-processes {processes}")
    jax.config.update("jax_num_cpu_devices", cpus // processes)

    number = args.devices or jax.device_count()
    if number > jax.device_count():
        raise SystemExit(f"--devices {number}, but there are {jax.device_count()}")
    if args.sequence_length % number:
        raise SystemExit(f"{number} devices do not divide --sequence-length {args.sequence_length}")
    # "Auto": the compiler distributes everything but the attention, which does that itself.
    return jax.make_mesh((number,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:number])


def one_device_mesh() -> Mesh:
    """The same mesh with one device of this process only: nothing is distributed."""
    return jax.make_mesh((1,), ("seq",), (AxisType.Auto,), devices=jax.local_devices()[:1])


def create_model(args: argparse.Namespace, mesh: Mesh) -> tuple[ByteTransformer, nnx.Optimizer]:
    """Makes model and optimizer, replicated over the devices of the mesh."""
    given = {"num_sink_tokens": args.sinks, "implementation": args.implementation}
    given = {name: value for name, value in given.items() if value is not None}
    pattern = tuple({**settings, **given} for settings in patterns(args.window)[args.model])
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=args.learning_rate / 10,
        peak_value=args.learning_rate,
        warmup_steps=args.steps // 10,
        decay_steps=args.steps,
        end_value=args.learning_rate / 20,
    )
    adamw = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )

    @nnx.jit(out_shardings=NamedSharding(mesh, PartitionSpec()))
    def create() -> tuple[ByteTransformer, nnx.Optimizer]:
        model = ByteTransformer(pattern, args.layers // len(pattern), rngs=nnx.Rngs(args.seed))
        return model, nnx.Optimizer(model, adamw, wrt=nnx.Param)

    with jax.set_mesh(mesh):
        return create()


def on_one_device(model: ByteTransformer) -> ByteTransformer:
    """A copy of the replicated model on one device of this process."""
    graph, parameters = nnx.split(model)
    return nnx.merge(graph, jax.device_put(jax.device_get(parameters), jax.local_devices()[0]))


def put(batch: Batch, mesh: Mesh) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cuts a batch [batch, sequence] along its sequence, over the devices of the mesh."""
    return shard(batch, NamedSharding(mesh, PartitionSpec(None, "seq")))


evaluate = nnx.jit(loss_fn)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(
    model: ByteTransformer,
    optimizer: nnx.Optimizer,
    tokens: jax.Array,
    targets: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """Improves the model; returns the loss that it had before."""
    loss, gradients = nnx.value_and_grad(loss_fn)(model, tokens, targets, segment_ids)
    optimizer.update(model, gradients)
    return loss


def train(
    model: ByteTransformer,
    optimizer: nnx.Optimizer,
    batches: Iterator[Batch],
    mesh: Mesh,
    *,
    steps: int,
    entropy: float,
) -> list[float]:
    """Trains the model in place; returns the loss of every step."""
    quiet = jax.process_index() > 0
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=steps, unit="step", disable=quiet, dynamic_ncols=True) as bar:
        for step, batch in zip(range(steps), batches, strict=False):
            if step == 0:
                alone = loss_on_one_device(model, batch)
            with jax.set_mesh(mesh):
                losses.append(float(train_step(model, optimizer, *put(batch, mesh))))
            status = f"loss {losses[-1]:.3f} (unigram entropy {entropy:.3f})"
            if step == 0:
                compare_first_loss(losses[0], alone, mesh)
                start = time.perf_counter()  # do not count the time that the compiler took
            else:
                speed = step * batch.tokens.size / (time.perf_counter() - start)
                status += f", {speed:,.0f} tokens/s"
            bar.set_postfix_str(status, refresh=False)
            bar.update()
    return losses


def loss_on_one_device(model: ByteTransformer, batch: Batch) -> float:
    """The loss of the same model on the same batch where there is nothing to exchange."""
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        return float(evaluate(on_one_device(model), *put(batch, mesh)))


def compare_first_loss(ring: float, alone: float, mesh: Mesh) -> None:
    """How many devices share the sequence must not matter beyond rounding."""
    if jax.process_index() == 0:
        tqdm.write(f"first loss: {ring:.6f} on {mesh.size} devices, {alone:.6f} on one device")
    if not math.isclose(ring, alone, rel_tol=1e-4):
        raise SystemExit(f"the loss on {mesh.size} devices, {ring}, is not that on one, {alone}")


def plot(losses: list[float], entropy: float, held_out: float, path: str) -> None:
    """Writes the loss curve as a PNG."""
    import matplotlib

    matplotlib.use("agg")  # works without a display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, label="training")
    axes.plot(len(losses), held_out, "o", label=f"held-out files: {held_out:.3f}")
    axes.axhline(entropy, color="gray", linestyle="--", label=f"unigram entropy: {entropy:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def continue_text(model: ByteTransformer, text: bytes, args: argparse.Namespace) -> str:
    """Samples what comes after `text`, the beginning of a document."""
    prompt = jnp.asarray(np.frombuffer(BEGIN + text, np.uint8), jnp.int32)
    with jax.set_mesh(one_device_mesh()):
        settings = args.sample_length, args.temperature, jax.random.key(args.seed)
        tokens = sample(on_one_device(model), prompt, *settings)
    continuation = np.asarray(tokens).astype(np.uint8).tobytes()
    return continuation.decode(errors="replace")


def main() -> None:
    """The whole job: data, training, evaluation, loss curve and sample."""
    args = parse_arguments()
    mesh = set_up_mesh(args)
    own = ("coordinator", "process_id", "output")  # all else is the same in every process
    check_processes(mesh, **{name: x for name, x in vars(args).items() if name not in own})
    corpus = load_corpus()
    entropy = corpus.unigram_entropy()
    model, optimizer = create_model(args, mesh)
    packing = {
        "batch_size": args.batch_size,
        "sequence_length": args.sequence_length,
        "document_length": args.document_length,
        "seed": args.seed,
    }

    # Every process does the same work; only the first one speaks of it.
    first_process = jax.process_index() == 0
    if first_process:
        parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        kind = mesh.devices.flat[0].device_kind
        print(f"text: {sum(map(len, corpus.train)):,} bytes in {len(corpus.train)} files")
        print(f"model: {args.model}, {parameters:,} parameters, window {args.window}")
        print(f"sequence: {args.sequence_length:,} tokens over {mesh.size} devices ({kind})")

    batches = packed_batches(corpus.train, **packing)
    losses = train(model, optimizer, batches, mesh, steps=args.steps, entropy=entropy)

    unseen = packed_batches(corpus.held_out, **packing)
    with jax.set_mesh(mesh):
        held_out = float(np.mean([evaluate(model, *put(next(unseen), mesh)) for _ in range(4)]))

    if first_process:
        plot(losses, entropy, held_out, args.output)
        print(f"loss: {losses[0]:.6f} at first, {losses[-1]:.6f} at last, in nats per byte")
        print(f"held-out files: {held_out:.3f}, unigram entropy: {entropy:.3f}")
        print(f"loss curve: {args.output}")
        name, text = corpus.held_out_names[-1], corpus.held_out[-1][:200]
        print(f"\n--- {name}, a held-out file, begins ---\n{text.decode(errors='replace')}")
        print(f"--- and the model goes on ---\n{continue_text(model, text, args)}")


if __name__ == "__main__":
    main()
