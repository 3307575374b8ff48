"""The shapes of the ring's benchmark, and what the PyTorch original took on them."""

import dataclasses
from typing import Self

import numpy as np

from benchmarks._shapes import Shape

ORIGINAL = "PyTorch original, FlashAttention-2, two H200 (copied, not run here)"


@dataclasses.dataclass(frozen=True)
class RingShape(Shape):
    """One attention call over a ring; ``length`` is that of the whole sequence.

    Attributes:
        original: milliseconds of the original on two H200, forward and forward+backward.
    """

    original: tuple[float, float] | None = None

    def chunk(self, devices: int) -> int:
        """Tokens of a device.

        Raises:
            ValueError: the devices do not divide the sequence.
        """
        if self.length % devices:
            raise ValueError(f"{devices} devices do not divide the {self.length} tokens")
        return self.length // devices

    def halo(self, devices: int) -> int:
        """Keys before the chunk that the windows of the last device reach."""
        most = self.length - self.chunk(devices)
        return most if self.window is None else min(self.window, most)

    def halo_after(self, devices: int) -> int:
        """Keys behind the chunk that the windows of the busiest device reach."""
        most = self.length - (self.busiest(devices) + 1) * self.chunk(devices)
        return most if self.after is None else min(self.after, most)

    def ends(self) -> np.ndarray:
        """cu_seqlens."""
        return np.cumsum([0, *(self.documents or (self.length,))]).astype(np.int32)

    def starts(self) -> np.ndarray:
        """Position of the first token of each token's sequence."""
        ends = self.ends()
        return np.repeat(ends[:-1], np.diff(ends))

    def busiest(self, devices: int) -> int:
        """The device with the most attended pairs, the last of these."""
        work = self.keys_seen().reshape(devices, self.chunk(devices)).sum(1)
        return devices - 1 - int(work[::-1].argmax())

    def tiny(self) -> Self:
        """As of any shape; the original's figures are of the whole one."""
        return dataclasses.replace(super().tiny(), original=None)


PACK = (512, 2000, 4000, 16000)


def _rows():
    for kind, sinks, whole, packed in (
        (
            "sliding",
            0,
            {1000: (1.659, 5.662), 4000: (4.315, 14.809), 8000: (8.185, 27.163)},
            {1000: (1.947, 5.839), 4000: (4.253, 12.017)},
        ),
        (
            "streaming",
            1,
            {1000: (1.880, 7.705), 4000: (4.596, 16.717), 8000: (8.352, 28.884)},
            {1000: (2.651, 8.444), 4000: (4.464, 14.930)},
        ),
    ):
        for window, original in whole.items():
            yield RingShape(f"{kind}-{window}", 32768, 32, 4, 128, window, sinks, original=original)
        for window, original in packed.items():
            yield RingShape(
                f"{kind}-varlen-{window}", sum(PACK), 32, 4, 128, window, sinks, PACK,
                original=original,
            )  # fmt: skip
    yield RingShape("mistral", 32768, 32, 8, 128, 4095, original=(4.557, 15.428))
    yield RingShape("gptoss", 32768, 64, 8, 64, 127, original=(1.017, 3.407))
    # The shape of the context-parallel tutorial in Transformer Engine's JAX documentation.
    yield RingShape("te-tutorial", 65536, 128, 8, 128, 8192, batch=2)


SHAPES = {shape.name: shape for shape in _rows()}

PACK_23 = (
    1200, 704, 9000, 2000, 7168, 512, 3100, 4096, 5500, 640, 1800, 6144,
    320, 2500, 960, 4400, 1536, 3000, 800, 2600, 1100, 1900, 4556,
)  # fmt: skip
"""Lengths of packed documents, 65536 tokens in all."""

LONG_SHAPES = {
    shape.name: shape
    for shape in (
        RingShape("full-64k", 65536, 32, 8, 128, None),
        RingShape("full-128k", 131072, 32, 8, 128, None),
        RingShape("gptoss-full", 65536, 64, 8, 64, None, learned=True),
        RingShape("gptoss-full-no-sinks", 65536, 64, 8, 64, None),
        RingShape("gemma-full", 65536, 16, 8, 256, None),
        RingShape("packed-full", 65536, 32, 8, 128, None, documents=PACK_23),
        RingShape("window-8k", 65536, 32, 8, 128, 8191),
        RingShape("window-12k", 65536, 32, 8, 128, 12287),
        RingShape("window-16k", 65536, 32, 8, 128, 16383),
        RingShape("window-32k", 65536, 32, 8, 128, 32767),
        RingShape("window-64k", 65536, 32, 8, 128, 65535),
    )
}
"""Layers without a window, and windows of a half to four chunks of four devices."""
