"""Your first training loop: a packed language model on a (data, seq) mesh, in one file.

    python examples/first_loop.py [FOLDER STEPS [HOST:PORT PROCESSES INDEX]]

Its text is Python's standard library, one token a byte. docs/training.md goes through it.
"""

import pathlib
import sys
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ring_swa_jax import Rope, check_processes
from ring_swa_jax.nnx import RingSlidingWindowAttention

BATCH, LENGTH, FEATURES = 4, 2048, 64


def packed_rows(files, rows, rng):
    """Rows full of random documents: tokens, the next tokens, and the document of each token."""
    documents: list[np.ndarray] = []
    while sum(len(document) for document in documents) <= rows * LENGTH:
        documents.append(files[rng.integers(len(files))][:500])
    ids = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    tokens = np.concatenate(documents).astype(np.int32)
    targets = np.where(ids[1:] == ids[:-1], tokens[1:], -1)  # none at a document's end
    fields = (tokens, targets, ids)
    return [field[: rows * LENGTH].astype(np.int32).reshape(rows, LENGTH) for field in fields]


class Layer(nnx.Module):
    """Attention and a network of two matrices, each around a residual."""

    def __init__(self, window_size, rngs):
        self.norms = nnx.List(nnx.RMSNorm(FEATURES, rngs=rngs) for _ in range(2))
        self.attention = RingSlidingWindowAttention(
            2, FEATURES, window_size=window_size, learned_sinks=True, rope=Rope(),
            batch_axis="data", seq_axis="seq", rngs=rngs,
        )  # fmt: skip
        self.up = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs)
        self.down = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x, segment_ids):
        x = x + self.attention(self.norms[0](x), segment_ids=segment_ids)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Model(nnx.Module):
    """One layer with a window, one without, as gpt-oss has them."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(256, FEATURES, rngs=rngs)
        self.layers = nnx.List(Layer(window_size, rngs) for window_size in (127, None))
        self.norm = nnx.RMSNorm(FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, 256, rngs=rngs)

    def __call__(self, tokens, segment_ids):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, segment_ids)
        return self.head(self.norm(x))


def loss_fn(model, tokens, targets, segment_ids):
    """Mean cross entropy over the tokens that have a target."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(tokens, segment_ids), jnp.maximum(targets, 0)
    )
    return jnp.mean(losses, where=targets >= 0)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model, optimizer, *batch):
    """Improves the model; returns the loss that it had before."""
    loss, gradients = nnx.value_and_grad(loss_fn)(model, *batch)
    optimizer.update(model, gradients)
    return loss


def main(folder="runs/first_loop", steps=20, address=None, processes=1, index=0):
    """Trains; goes on from the folder's newest checkpoint, if there is one."""
    jax.config.update("jax_num_cpu_devices", 8 // int(processes))  # GPUs need no such line
    if address:
        jax.distributed.initialize(address, int(processes), int(index))
    # Each process has a part of "data" to itself, so that it holds whole rows of the batch.
    data = max(jax.process_count(), min(2, jax.device_count()))
    shape = data, jax.device_count() // data
    mesh = jax.make_mesh(shape, ("data", "seq"), (AxisType.Auto,) * 2)
    check_processes(mesh, batch=BATCH, length=LENGTH, steps=steps)
    jax.set_mesh(mesh)

    @nnx.jit(out_shardings=NamedSharding(mesh, P()))  # whole on every device
    def create():
        model = Model(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)

    model, optimizer = create()
    options = ocp.CheckpointManagerOptions(save_interval_steps=10, max_to_keep=2)
    manager = ocp.CheckpointManager(pathlib.Path(folder).resolve(), options=options)
    first = manager.latest_step() or 0
    if first:
        saved = ocp.args.StandardRestore(nnx.state((model, optimizer)))
        nnx.update((model, optimizer), manager.restore(first, args=saved))

    # Each process reads its own files and fills its own rows.
    paths = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    own = [path.read_bytes() for path in paths[jax.process_index() :: jax.process_count()]]
    files = [np.frombuffer(text, np.uint8) for text in own if text]
    cut = NamedSharding(mesh, P("data", "seq"))
    for step in range(first, int(steps)):
        rng = np.random.default_rng([jax.process_index(), step])
        rows = packed_rows(files, BATCH // jax.process_count(), rng)
        batch = [jax.make_array_from_process_local_data(cut, x, (BATCH, LENGTH)) for x in rows]
        loss = train_step(model, optimizer, *batch)
        if jax.process_index() == 0 and (step + 1) % 5 == 0:
            print(f"step {step + 1}: loss {loss:.3f}")
        state = ocp.args.StandardSave(nnx.state((model, optimizer)))
        manager.save(step + 1, args=state)  # every tenth
    manager.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
