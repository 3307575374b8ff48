"""The folder of a run of `train_lm.py`: settings, tokenizer, checkpoints and log."""

import logging
import pathlib

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Sharding

from _settings import Settings
from _tokenizer import BytePairs

# How many checkpoints stay.
_KEEP = 2
# What it says at every save is of no use here.
logging.getLogger("absl").setLevel(logging.ERROR)


class RunFolder:
    """Where a run keeps what it needs to go on, and what `sample.py` reads.

    Args:
        path: the folder. With several processes all of them must see it.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path.resolve()  # orbax takes no other paths
        self.log = self.path / "log.jsonl"
        self.curve = self.path / "loss.png"
        self._settings = self.path / "settings.json"
        self._tokenizer = self.path / "tokenizer.json"

    def exists(self) -> bool:
        """Whether there is a run."""
        return self._settings.exists() and self._tokenizer.exists()

    def create(self, settings: Settings, tokenizer: BytePairs) -> None:
        """Writes what every later use of the folder reads."""
        self.path.mkdir(parents=True, exist_ok=True)
        settings.save(self._settings)
        tokenizer.save(self._tokenizer)

    def settings(self) -> Settings:
        """Those that the run began with."""
        return Settings.load(self._settings)

    def tokenizer(self) -> BytePairs:
        """That of the run."""
        return BytePairs.load(self._tokenizer)


class Checkpoints:
    """Saves models and optimizers beside each other, and restores both or the model alone.

    A checkpoint knows nothing of devices: what is restored has the sharding that is asked for.
    """

    def __init__(self, folder: RunFolder):
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEEP, create=True)
        self._manager = ocp.CheckpointManager(folder.path / "checkpoints", options=options)

    def steps(self) -> list[int]:
        """After how many steps the checkpoints were taken."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        """Saves the state after `step` steps; writing goes on beside the next ones."""
        if step in self.steps():
            return
        items = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
        arguments = {name: ocp.args.StandardSave(state) for name, state in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**arguments))

    def restore(self, step: int, sharding: Sharding, **objects: nnx.Module | nnx.Optimizer) -> None:
        """Sets `model=` and, where given, `optimizer=` to the state after `step` steps."""
        wanted = {
            name: ocp.args.StandardRestore(_abstract(nnx.state(value), sharding))
            for name, value in objects.items()
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        for name, value in objects.items():
            nnx.update(value, restored[name])

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _abstract(state: nnx.State, sharding: Sharding) -> nnx.State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
