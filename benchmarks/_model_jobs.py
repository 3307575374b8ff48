"""What the whole-model benchmark runs, and in which order."""

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType

from benchmarks._model_contenders import ALL_GATHER, CONTENDERS, OURS
from benchmarks._model_decoder import Decoder
from benchmarks._model_sharding import AXES
from benchmarks._model_sizes import MODELS, ModelSize, short, tiny
from benchmarks._model_step import Training


@dataclasses.dataclass(frozen=True)
class Job:
    """A training step to be measured.

    Attributes:
        model: its name.
        contender: whose attention.
        data: devices that cut the batch.
        seq: devices that cut the sequence.
        batch: sequences in all.
        length: tokens of each.
        steps: how many are timed; 0: the program is compiled and its memory counted.
        profile: whether one more step is taken apart.
        check: instead of a step, loss and gradients of a few layers by all contenders.
    """

    model: str
    contender: str
    data: int
    seq: int
    batch: int
    length: int
    steps: int = 3
    profile: bool = False
    check: bool = False

    @property
    def devices(self) -> int:
        """How many."""
        return self.data * self.seq

    @property
    def family(self) -> tuple[Any, ...]:
        """What jobs have in common that differ in length alone."""
        return self.model, self.contender, self.data, self.seq, self.batch

    def training(self, *, quick: bool) -> Training:
        """The model on the job's mesh; ``quick``: a tiny one."""
        size: ModelSize = MODELS[self.model]
        size = short(size) if self.check else size
        size = tiny(size) if quick else size
        shape = (self.data, self.seq)
        kinds = (AxisType.Auto,) * 2
        mesh = jax.make_mesh(shape, AXES, kinds, devices=jax.devices()[: self.devices])
        return Training(Decoder(size), mesh)


def plan(models: list[str], devices: int) -> list[Job]:
    """All jobs, what matters most first.

    The checks; 64k tokens on all devices; as many tokens a device on one; 128k; the same sequence
    in a batch as large as the devices, and the memory of longer ones; two axes; two devices; longer
    and shorter ones.
    """
    k = 1024

    def over(contenders, data, seq, batch, length, steps=3):
        return [Job(m, c, data, seq, batch, length, steps) for m in models for c in contenders]

    every, alone = list(CONTENDERS), [OURS, ALL_GATHER]
    jobs = [Job(model, OURS, 1, devices, 1, 4 * k, check=True) for model in models]
    jobs += over(every, 1, devices, 1, 64 * k)
    jobs += over(alone, 1, 1, 1, 64 * k // devices)
    jobs += over(every, 1, devices, 1, 128 * k)
    for length in (256, 512):
        jobs += over(every, 1, devices, 1, length * k, steps=0)
    jobs += over([OURS], 1, 1, 1, 64 * k) + over([OURS], 1, devices, devices, 64 * k)
    if devices > 2:
        jobs += over(every, 2, devices // 2, 2, 64 * k)
    jobs += over([OURS], 1, devices, 1, 256 * k, steps=2)
    for length in (1024, 2048):
        jobs += over(every, 1, devices, 1, length * k, steps=0)
    for length in (128, 256):
        jobs += over(alone, 1, 1, 1, length * k, steps=0)
    if devices > 2:
        jobs += over(every, 1, 2, 1, 64 * k)
    jobs += over(every, 1, devices, 1, 32 * k) + over(alone, 1, 1, 1, 32 * k)
    return list(dict.fromkeys(jobs))
