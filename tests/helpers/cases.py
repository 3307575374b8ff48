"""Cases of the attention: a frozen record that replays, and one generator of random ones."""

import dataclasses
import functools
import itertools
import random

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests.helpers import oracle

HEAD_DIMS = [(16, 16), (16, 16), (32, 16), (16, 32), (24, 8)]  # (H, Hv)
HEADS = [(1, 1), (2, 2), (2, 1), (4, 2), (3, 1), (6, 2)]  # (N, K)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem. Its repr is Python: paste it into `check(Case(...), route)`.

    documents: one tuple of run lengths per batch row, negative for padding, () for one whole
    sequence, None for no documents at all. packed: give them as cu_seqlens (one row, padding only
    at the end) instead of segment_ids.
    """

    chunk: int
    devices: int
    window: int | tuple | None
    sinks: int = 0
    documents: tuple | None = None
    packed: bool = False
    batch: int = 1
    heads: tuple = (2, 1)
    dims: tuple = (16, 16)
    softcap: float | None = None
    learned: bool = False
    scale: float | None = None
    dtype: str = "float32"
    seed: int = 0

    @property
    def length(self):
        """Length of the whole sequence."""
        return self.chunk * self.devices

    @property
    def options(self):
        """Keyword arguments that every public function takes under these names."""
        return dict(window_size=self.window, scale=self.scale, logits_soft_cap=self.softcap)

    def segment_ids(self):
        """[B, S] int32 or None. Ids repeat (0, 1, 2, 0, ...): only a change starts a sequence."""
        if self.documents is None:
            return None
        rows = []
        for runs in self.documents:
            row, count = [], 0
            for run in runs:
                if run < 0:
                    row += [-1 - count % 3] * -run
                elif run > 0:
                    row += [count % 3] * run
                    count += 1
            rows.append(row if runs else [7] * self.length)
        return np.array(rows, np.int32)

    def cu_seqlens(self):
        """[n + 1] int32: the first row's documents, empty ones included, padding left out."""
        runs = [run for run in self.documents[0] if run >= 0]
        return np.cumsum([0, *runs]).astype(np.int32)

    def mask(self):
        """The oracle's [B, S, S] mask."""
        if self.documents is None:
            starts = [np.zeros(self.length, np.int64)] * self.batch
        elif self.packed:
            starts = [oracle.starts_from_cu_seqlens(self.cu_seqlens(), self.length)]
        else:
            starts = [oracle.starts_from_segment_ids(ids) for ids in self.segment_ids()]
        return np.stack([oracle.visible(start, self.window, self.sinks) for start in starts])

    def arrays(self):
        """(q, k, v, sink_logits or None) and the cotangent, as JAX arrays of the case's dtype."""
        rng = np.random.default_rng(self.seed)
        (n, kv), (h, hv) = self.heads, self.dims
        widths = [(n, h), (kv, h), (kv, hv), (n, hv)]
        q, k, v, dout = (
            jnp.asarray(rng.standard_normal((self.batch, self.length, *w)), self.dtype)
            for w in widths
        )
        sink = jnp.asarray(rng.standard_normal(n), jnp.float32) if self.learned else None
        return (q, k, v, sink), dout

    @functools.cached_property
    def expected(self):
        """The oracle's Result for `arrays()`, as the dtype rounded them."""
        (q, k, v, sink), dout = self.arrays()
        q, k, v, dout = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, dout))
        return oracle.attention(
            q, k, v, dout, self.mask(),
            scale=self.scale, logits_soft_cap=self.softcap,
            sink_logits=None if sink is None else np.asarray(sink, np.float64),
        )  # fmt: skip


def random_runs(rng, chunk, length, padding_inside):
    """Documents of one row: many end on or next to a chunk's edge; some are empty or padding."""
    edges = [m + d for m in range(0, length + 1, chunk) for d in (-1, 0, 1)]
    cuts = set(rng.sample(edges, min(len(edges), rng.randint(0, 5))))
    cuts |= {rng.randint(0, length) for _ in range(rng.randint(0, 3))}
    cuts = [0, *sorted(c for c in cuts if 0 < c < length), length]
    runs = [b - a for a, b in itertools.pairwise(cuts)]
    if rng.random() < 0.5:
        runs[-1] *= -1  # padding at the end
    if padding_inside and rng.random() < 0.5:
        runs[rng.randrange(len(runs))] *= -1
    for _ in range(rng.randint(0, 2)):  # empty ones; at the end they repeat the last entry
        runs.insert(rng.randint(0, len(runs)), 0)
    return tuple(runs)


def random_case(rng: random.Random) -> Case:
    """A random case; every route of `tests.helpers.routes` that suits its documents can run it."""
    devices = rng.choice([1, 2, 3, 4, 5, 6, 7, 8])
    chunk = rng.choice([1, 2, 3, 5, 7, 8, 13, 16, 21, 33, 40])
    length = devices * chunk
    edges = [0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk - 1, 2 * chunk, 2 * chunk + 1, 3 * chunk]
    long = [length - 1, length, length + 5, None]
    window = rng.choice([*edges, *edges, *long, rng.randint(0, length)])
    most = chunk if devices > 1 else length + 2
    sinks = rng.choice([0, 0, 1, min(2, most), min(4, most), chunk, rng.randint(0, most)])
    kind = rng.choice(["whole", "segments", "segments", "packed"])
    batch = {"whole": rng.randint(1, 2), "segments": rng.randint(2, 3), "packed": 1}[kind]
    documents = None
    if kind != "whole":
        documents = tuple(random_runs(rng, chunk, length, kind == "segments") for _ in range(batch))
    return Case(
        chunk=chunk,
        devices=devices,
        window=window,
        sinks=sinks,
        documents=documents,
        packed=kind == "packed",
        batch=batch,
        heads=rng.choice(HEADS),
        dims=rng.choice(HEAD_DIMS),
        softcap=rng.choice([None, None, 2.0, 30.0]),
        learned=rng.random() < 0.4,
        scale=rng.choice([None, None, 0.5]),
        dtype=rng.choice(["float32"] * 4 + ["bfloat16", "float16"]),
        seed=rng.randrange(2**16),
    )


def cases():
    """Hypothesis strategy over `random_case`."""
    return st.randoms(use_true_random=False).map(random_case)
