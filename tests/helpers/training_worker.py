"""A small training job, started as `train_lm.py` starts and checkpointed as it does.

Run as `python -m tests.helpers.training_worker FOLDER STEPS DEVICES [PORT PROCESSES INDEX]`.

Goes on from the newest checkpoint of FOLDER, saves after every second step, and appends the loss of
each step to the file `losses` there. The batch of a step depends on the step alone.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np
import optax
from flax import nnx

from ring_swa_jax import Rope, check_processes
from ring_swa_jax.nnx import RingSlidingWindowAttention
from tests.helpers.processes import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from _checkpoint import Checkpoints, RunFolder
from _data import Batch
from _devices import cut, make_mesh, replicated, start_jax

VOCABULARY, FEATURES, LENGTH = 32, 32, 64


class Model(nnx.Module):
    """An embedding, one layer, and the logits."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.attention = RingSlidingWindowAttention(
            2, FEATURES, window_size=20, rope=Rope(), batch_axis="data", rngs=rngs
        )

    def __call__(self, tokens, segment_ids):
        x = self.embedding(tokens)
        return self.embedding.attend(x + self.attention(x, segment_ids=segment_ids))


def loss_fn(model, tokens, targets, segment_ids):
    logits = model(tokens, segment_ids)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def train_step(model, optimizer, *batch):
    loss, gradients = nnx.value_and_grad(loss_fn)(model, *batch)
    optimizer.update(model, gradients)
    return loss


def batch_of(step):
    rng = np.random.default_rng(step)
    tokens, targets = rng.integers(0, VOCABULARY, (2, 1, LENGTH), np.int32)
    return Batch(tokens, targets, np.sort(rng.integers(0, 3, (1, LENGTH), np.int32)))


def main(folder, steps, devices, port=None, processes=None, index=None):
    start = argparse.Namespace(
        coordinator=port and f"127.0.0.1:{port}",
        num_processes=processes and int(processes),
        process_id=index and int(index),
        distributed=False,
        devices=int(devices),
        data=1,
    )
    mesh = make_mesh(1, start_jax(start))
    check_processes(mesh, first_batch=vars(batch_of(0)))

    @nnx.jit(out_shardings=replicated(mesh))
    def create():
        model = Model(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    with jax.set_mesh(mesh):
        model, optimizer = create()
        checkpoints = Checkpoints(RunFolder(pathlib.Path(folder)))
        first = max(checkpoints.steps(), default=0)
        if first:
            checkpoints.restore(first, replicated(mesh), model=model, optimizer=optimizer)
        for step in range(first, int(steps)):
            loss = train_step(model, optimizer, *batch_of(step).put(cut(mesh)))
            if jax.process_index() == 0:
                with pathlib.Path(folder, "losses").open("a") as file:
                    file.write(f"{step} {float(loss)!r}\n")
            if (step + 1) % 2 == 0:
                checkpoints.save(step + 1, model, optimizer)
        checkpoints.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
