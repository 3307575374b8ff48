"""The steps of `train_lm.py`: model, optimizer, loop, and what ends it."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from types import FrameType

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from _checkpoint import Checkpoints
from _data import Batch, PackedStream
from _devices import cut, replicated
from _log import Log
from _loss_scale import loss_scale
from _model import Transformer, loss_fn
from _optimizer import make_optimizer
from _settings import Settings

evaluate = nnx.jit(loss_fn)


def create_model(
    settings: Settings, vocabulary: int, implementation: str | None, mesh: Mesh
) -> Transformer:
    """Makes the model, replicated over the devices of the mesh."""
    pattern = settings.pattern(implementation)

    @nnx.jit(out_shardings=replicated(mesh))
    def create() -> Transformer:
        size, repeats = settings.size(vocabulary), settings.layers // len(pattern)
        return Transformer(size, pattern, repeats, rngs=nnx.Rngs(settings.seed))

    with jax.set_mesh(mesh):
        return create()


def create_optimizer(settings: Settings, model: Transformer, mesh: Mesh) -> nnx.Optimizer:
    """Makes the model's optimizer, replicated as the model is."""
    transformation = make_optimizer(settings)

    @nnx.jit(out_shardings=replicated(mesh))
    def create(model: Transformer) -> nnx.Optimizer:
        return nnx.Optimizer(model, transformation, wrt=nnx.Param)

    with jax.set_mesh(mesh):
        return create(model)


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(
    model: Transformer,
    optimizer: nnx.Optimizer,
    tokens: jax.Array,
    targets: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """Improves the model; returns the loss that it had before."""
    scale = loss_scale(optimizer)

    def scaled_loss(model: Transformer) -> tuple[jax.Array, jax.Array]:
        loss = loss_fn(model, tokens, targets, segment_ids)
        return loss * scale, loss

    (_, loss), gradients = nnx.value_and_grad(scaled_loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    return loss


class Stop:
    """Whether somebody asked for an end: Ctrl-C, or SIGTERM as a cluster sends it.

    The first signal lets the step under way end; the second one ends Python as usual.
    """

    def __enter__(self) -> "Stop":
        self._asked = False
        self._before = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._asked = True
        signal.signal(number, self._before[signal.Signals(number)])
        tqdm.write("stopping after this step; once more to stop at once")

    def asked(self) -> bool:
        """Whether any process was asked, the same answer in all of them."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.process_allgather(np.asarray(self._asked)).any())


@dataclasses.dataclass
class Trainer:
    """What the loop over the steps needs."""

    settings: Settings
    model: Transformer
    optimizer: nnx.Optimizer
    mesh: Mesh
    training: PackedStream
    held_out: list[Batch]
    checkpoints: Checkpoints
    log: Log
    checkpoint_every: int
    evaluate_every: int
    _compiled: set[str] = dataclasses.field(default_factory=set)

    def batch(self, step: int) -> Batch:
        """What this step, from 0, trains on."""
        settings = self.settings
        length = settings.length_at(step)
        return self.training.batch(settings.first_token(step), settings.batch_size, length)

    def run(self, first: int) -> int:
        """Trains from step `first` on; returns after how many steps it ended."""
        steps = self.settings.steps
        # A bar is for terminals (None), and for one process.
        disable = True if jax.process_index() > 0 else None
        bar = tqdm(
            total=steps,
            initial=first,
            unit="step",
            disable=disable,
            dynamic_ncols=True,
            leave=False,
        )
        step = first
        with Stop() as stop, bar, jax.set_mesh(self.mesh):
            while step < steps and not stop.asked():
                loss, speed = self._step(step)
                step += 1
                if step % self.evaluate_every == 0 and step < steps:
                    self.evaluate(step)
                if step % self.checkpoint_every == 0:
                    self.checkpoints.save(step, self.model, self.optimizer)
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update()
            self.checkpoints.save(step, self.model, self.optimizer)
        return step

    def _step(self, step: int) -> tuple[float, float]:
        """One step; returns its loss and its tokens per second."""
        batch = self.batch(step)
        with self.compiling(f"the training step of {batch.tokens.shape[1]:,} tokens"):
            start = time.perf_counter()
            arguments = batch.put(cut(self.mesh))
            loss = float(train_step(self.model, self.optimizer, *arguments))
            seconds = time.perf_counter() - start
        speed = batch.tokens.size / seconds
        self.log.add(step=step + 1, loss=loss, tokens=batch.tokens.size, seconds=round(seconds, 4))
        return loss, speed

    def evaluate(self, step: int) -> float:
        """The loss on held-out files after `step` steps, in nats per token."""
        with self.compiling("the evaluation"):
            batches = (batch.put(cut(self.mesh)) for batch in self.held_out)
            loss = float(np.mean([evaluate(self.model, *batch) for batch in batches]))
        self.log.add(step=step, held_out_loss=loss)
        if jax.process_index() == 0:
            tqdm.write(f"step {step}: {loss:.3f} nats per token on held-out files")
        return loss

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Says at the first use of a program that it is being compiled."""
        if what in self._compiled or jax.process_index() > 0:
            yield
            return
        self._compiled.add(what)
        tqdm.write(f"compiling {what} ...")
        start = time.perf_counter()
        yield
        tqdm.write(f"... took {time.perf_counter() - start:.0f} s")
