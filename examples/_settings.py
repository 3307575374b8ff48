"""What a run of `train_lm.py` is: the settings that decide its losses, and presets of them."""

import dataclasses
import json
import pathlib
from typing import Any

import jax

from ring_swa_jax import half_precision_dtype

from _model import Size, patterns


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the losses. A run that is resumed keeps them; devices may change."""

    model: str
    layers: int
    features: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    window: int
    sinks: int | None
    """First tokens of its document that a token sees besides; None is the model's own number."""
    dtype: str
    remat: bool
    text: str | None
    """Folder of the text; None is Python's standard library."""
    document_length: int
    batch_size: int
    sequence_length: int
    short_length: int
    """Length of the sequences in the first steps."""
    short_share: float
    """Which part of the steps these are."""
    steps: int
    learning_rate: float
    seed: int

    @property
    def short_steps(self) -> int:
        """How many of the first steps have short sequences."""
        if self.short_length >= self.sequence_length:
            return 0
        return int(self.steps * self.short_share)

    def length_at(self, step: int) -> int:
        """Length of the sequences in this step, from 0."""
        return self.short_length if step < self.short_steps else self.sequence_length

    def first_token(self, step: int) -> int:
        """Where in the stream of training text this step begins."""
        short = min(step, self.short_steps)
        tokens = short * self.short_length + (step - short) * self.sequence_length
        return self.batch_size * tokens

    def size(self, vocabulary: int) -> Size:
        """Sizes of the model with as many tokens as there are."""
        return Size(
            vocabulary,
            self.features,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.dtype,
            self.remat,
        )

    def pattern(self, implementation: str | None) -> tuple[dict[str, Any], ...]:
        """Settings of the layers that repeat."""
        given = {"num_sink_tokens": self.sinks, "implementation": implementation}
        given = {name: value for name, value in given.items() if value is not None}
        return tuple({**layer, **given} for layer in patterns(self.window)[self.model])

    def save(self, path: pathlib.Path) -> None:
        """Writes them as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: pathlib.Path) -> "Settings":
        """Reads what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


LAPTOP: dict[str, Any] = dict(
    model="sliding-window",
    features=128,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    vocabulary=1024,
    window=127,
    sinks=None,
    dtype="float32",
    remat=False,
    text=None,
    document_length=1024,
    batch_size=1,
    sequence_length=16384,
    short_length=4096,
    short_share=0.97,
    steps=320,
    learning_rate=1e-2,
    seed=0,
)
# `fitted` adds dtype and lengths, by the card.
GPU: dict[str, Any] = LAPTOP | dict(
    features=768,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    vocabulary=8192,
    window=1023,
    remat=True,
    document_length=4096,
    short_share=0.0,
    steps=250,
    learning_rate=1e-3,
)
PRESETS = {"laptop": LAPTOP, "gpu": GPU}
_LAYERS = {"laptop": 4, "gpu": 12}
# Of the preset "gpu". Compiled for an H100 a token needs 105 kB, for a T4 151 kB: they take a sixth
# of the memory at most. Longer sequences would see the text, 2.5 million tokens, too often.
_TOKENS_PER_GIGABYTE = 1024


def preset_for(device: jax.Device) -> str:
    """The name of the preset that fits a device."""
    return "laptop" if device.platform == "cpu" else "gpu"


def default_layers(preset: str, model: str) -> int:
    """The preset's number of layers, in whole repeats of the model's pattern."""
    length = len(patterns(0)[model])
    return -(-_LAYERS[preset] // length) * length


def fitted(preset: str, device: jax.Device, sequence_devices: int) -> dict[str, Any]:
    """The preset's settings: on GPUs in half precision, sequences as long as their memory holds.

    Args:
        preset: its name.
        device: one of those that share a sequence.
        sequence_devices: how many they are.
    """
    settings = dict(PRESETS[preset])
    if preset == "laptop":
        return settings
    settings["dtype"] = half_precision_dtype().name
    if device.platform == "cpu":
        return settings
    gigabytes = (device.memory_stats() or {}).get("bytes_limit", 16e9) / 1e9
    each = 1 << int(gigabytes * _TOKENS_PER_GIGABYTE).bit_length() - 1
    settings["sequence_length"] = sequence_devices * each
    settings["short_length"] = sequence_devices * max(each // 8, 1024)
    return settings
