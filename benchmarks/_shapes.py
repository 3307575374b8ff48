"""The shapes that are measured, and the useful work of each."""

import dataclasses
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention call, in bfloat16.

    ``window`` and ``after`` are the keys before and after a query that it sees, None for all.
    ``documents`` are the lengths of packed sequences; empty for one sequence of ``length``.
    ``learned`` is whether heads have learned sinks; ``value_dim`` is that of values, None for
    ``dim``.
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
    learned: bool = False
    value_dim: int | None = None

    @property
    def dim_of_values(self) -> int:
        """Head dim of values."""
        return self.value_dim or self.dim

    @property
    def window_size(self) -> int | tuple[int | None, int | None] | None:
        """What our functions take."""
        return self.window if self.after == 0 else (self.window, self.after)

    def keys_seen(self) -> np.ndarray:
        """How many keys each query of a row attends."""
        seen = []
        for length in self.documents or (self.length,):
            i = np.arange(length, dtype=np.int64)
            window = i if self.window is None else np.minimum(i, self.window)
            sinks = np.minimum(np.maximum(i - window, 0), self.sinks)
            after = i[::-1] if self.after is None else np.minimum(i[::-1], self.after)
            seen.append(window + 1 + sinks + after)
        return np.concatenate(seen)

    def pairs(self) -> int:
        """How many (query, key) pairs of one head are attended, in all rows."""
        return self.batch * int(self.keys_seen().sum())

    def forward_flops(self) -> float:
        """Of the two products of the forward pass over attended pairs."""
        return 2.0 * self.pairs() * self.heads * (self.dim + self.dim_of_values)

    def backward_flops(self) -> float:
        """Of the five products of the backward pass."""
        return 2.0 * self.pairs() * self.heads * (3 * self.dim + 2 * self.dim_of_values)

    def tiny(self) -> Self:
        """A shape of the same kind for a smoke test: a 64th of the tokens, few and small heads."""

        def short(bound: int | None) -> int | None:
            return None if bound is None else bound // 64

        documents = tuple(max(length // 64 // 8, 1) * 8 for length in self.documents)
        return dataclasses.replace(
            self,
            length=sum(documents) or self.length // 64,
            documents=documents,
            window=short(self.window),
            after=short(self.after),
            batch=min(self.batch, 2),
            heads=8,
            kv_heads=4,
            dim=16,
            value_dim=None,
        )


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


def random_documents(count: int, length: int = 32768) -> tuple[int, ...]:
    """Lengths of so many documents, always the same ones, that fill a sequence."""
    cuts = np.random.default_rng(count).choice(np.arange(1, length), count - 1, replace=False)
    return tuple(np.diff([0, *np.sort(cuts), length]).tolist())


# What real models have beside plain windows: learned sinks, values of another size, documents of
# random lengths, layers without a window, batches of short sequences.
MODELS = {
    shape.name: shape
    for shape in (
        Shape("gptoss-learned", 32768, 64, 8, 64, 127, learned=True),
        Shape("mimo", 32768, 64, 8, 192, 128, learned=True, value_dim=128),
        Shape("mistral-23", 32768, 32, 8, 128, 4095, documents=random_documents(23)),
        Shape("mistral-60", 32768, 32, 8, 128, 4095, documents=random_documents(60)),
        Shape("long-gqa-23", 32768, 32, 4, 128, 1000, documents=random_documents(23)),
        Shape("full-23", 32768, 32, 8, 128, None, documents=random_documents(23)),
        Shape("full32k", 32768, 32, 8, 128, None),
        Shape("full-64", 16384, 64, 8, 64, None),
        Shape("batch-2k", 2048, 32, 8, 128, None, batch=8),
        Shape("batch-8k", 8192, 32, 8, 128, None, batch=4),
        Shape("batch-4k-64", 4096, 64, 8, 64, None, batch=8),
        Shape("batch-4k-window", 4096, 32, 8, 128, 1023, batch=8),
    )
}

# Lengths that no tile divides.
ODD = {
    shape.name: shape
    for shape in (
        Shape("long-gqa-odd", 32763, 32, 4, 128, 1000),
        Shape("full16k-odd", 16379, 16, 16, 128, None),
    )
}

ALL = SHAPES | VARIED | BOTH_SIDES | MODELS | ODD
