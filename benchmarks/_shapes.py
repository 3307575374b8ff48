"""The shapes that are measured, and the useful work of each."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention call, in bfloat16.

    ``window`` and ``after`` are the keys before and after a query that it sees, None for all.
    ``documents`` are the lengths of packed sequences; empty for one sequence of ``length``.
    """

    name: str
    length: int
    heads: int
    kv_heads: int
    dim: int
    window: int | None
    sinks: int = 0
    documents: tuple[int, ...] = ()
    after: int | None = 0
    batch: int = 1

    @property
    def window_size(self) -> int | tuple[int | None, int | None] | None:
        """What our functions take."""
        return self.window if self.after == 0 else (self.window, self.after)

    def pairs(self) -> int:
        """How many (query, key) pairs of one head are attended, in all rows."""
        total = 0
        for length in self.documents or (self.length,):
            i = np.arange(length, dtype=np.int64)
            window = i if self.window is None else np.minimum(i, self.window)
            sinks = np.minimum(np.maximum(i - window, 0), self.sinks)
            after = i[::-1] if self.after is None else np.minimum(i[::-1], self.after)
            total += int((window + 1 + sinks + after).sum())
        return self.batch * total

    def forward_flops(self) -> float:
        """Of the two products of the forward pass over attended pairs."""
        return 4.0 * self.pairs() * self.heads * self.dim

    def backward_flops(self) -> float:
        """Of the five products of the backward pass."""
        return 10.0 * self.pairs() * self.heads * self.dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mistral", 32768, 32, 8, 128, 4095),
        Shape("long-gqa", 32768, 32, 4, 128, 1000),
        Shape("gptoss", 32768, 64, 8, 64, 127),
        Shape("full16k", 16384, 16, 16, 128, None),
        Shape("gemma3", 32768, 16, 8, 256, 1023),
    )
}

# Packed documents and sink tokens, beside the plain shape whose tiles they share.
VARIED = {
    shape.name: shape
    for shape in (
        Shape(
            "mistral-packed", 32768, 32, 8, 128, 4095,
            documents=(704, 9000, 1200, 7168, 2000, 5500, 3100, 4096),
        ),
        Shape(
            "long-gqa-packed", 32768, 32, 4, 128, 1000,
            documents=(512, 2000, 4000, 16000, 10256),
        ),
        Shape("long-gqa-sinks", 32768, 32, 4, 128, 1000, sinks=4),
    )
}  # fmt: skip

# Windows to both sides: an encoder's, ModernBERT's, and none.
BOTH_SIDES = {
    shape.name: shape
    for shape in (
        Shape("both-512", 32768, 32, 8, 128, 512, after=512),
        Shape("both-2048", 32768, 32, 8, 128, 2048, after=2048),
        Shape("modernbert", 8192, 16, 16, 64, 64, after=64, batch=8),
        Shape("not-causal", 16384, 16, 16, 128, None, after=None),
    )
}

ALL = SHAPES | VARIED | BOTH_SIDES
