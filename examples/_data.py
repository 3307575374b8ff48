"""Real text for `train_lm.py`: Python's standard library, packed into long sequences.

Every installation of Python brings about ten megabytes of source text, so nothing is downloaded.
"""

import dataclasses
import pathlib
import sysconfig
from collections.abc import Iterator

import jax
import numpy as np

# A byte that no source file holds opens every document. The model can thus predict the first real
# byte, and the sink tokens, which are a document's own first tokens, always include this one.
BEGIN = b"\0"
NO_TARGET = -1

# Installed packages are not the standard library; the others are mostly tables and test data.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Source files as bytes: those to train on, and those the model never sees."""

    train: list[bytes]
    held_out: list[bytes]
    held_out_names: list[str]

    def unigram_entropy(self) -> float:
        """Nats per byte of a model that knows how often each byte occurs and nothing else."""
        counts = np.bincount(np.frombuffer(b"".join(self.train), np.uint8), minlength=256)
        frequencies = counts[counts > 0] / counts.sum()
        return float(-(frequencies * np.log(frequencies)).sum())


def load_corpus() -> Corpus:
    """Reads the standard library's source files; every twentieth is held out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts)
    )
    files = [(str(path.relative_to(root)), path.read_bytes()) for path in paths]
    files = [(name, text) for name, text in files if text and BEGIN not in text]
    if len(files) < 40:
        raise SystemExit(
            f"found {len(files)} source files of Python's standard library under {root}: "
            "this Python comes without them, so run the example with another one"
        )
    held_out = files[::20]
    train = [text for number, (_, text) in enumerate(files) if number % 20]
    return Corpus(train, [text for _, text in held_out], [name for name, _ in held_out])


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences, each field an int32 array [batch, sequence]."""

    tokens: np.ndarray
    """The bytes."""
    targets: np.ndarray
    """The byte after each of them, or NO_TARGET where that belongs to another document."""
    segment_ids: np.ndarray
    """Which document of the pack each byte belongs to: 0, 1, 2, ..."""


def packed_batches(
    files: list[bytes], *, batch_size: int, sequence_length: int, document_length: int, seed: int
) -> Iterator[Batch]:
    """Yields batches of packed documents for ever, the same for the same seed.

    A file of more than `document_length` bytes becomes several documents, so that a sequence does
    not hold one file only. Documents follow each other in a new random order in every epoch,
    without padding: the one that a sequence's end cuts goes on in the next sequence.
    """
    documents = [
        file[start : start + document_length]
        for file in files
        for start in range(0, len(file), document_length)
    ]
    sequences = _packed_sequences(documents, sequence_length, np.random.default_rng(seed))
    while True:
        rows = [next(sequences) for _ in range(batch_size)]
        yield Batch(*(np.stack(field) for field in zip(*rows, strict=True)))


def _packed_sequences(
    documents: list[bytes], length: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    # One token more than a sequence: the last input needs a target too.
    text, ids, count = bytearray(), list[int](), 0
    while True:
        for index in rng.permutation(len(documents)):
            document = BEGIN + documents[index]
            text += document
            ids += [count] * len(document)
            count += 1
            while len(text) > length:
                tokens = np.frombuffer(bytes(text[: length + 1]), np.uint8).astype(np.int32)
                segments = np.asarray(ids[: length + 1], np.int32)
                segments -= segments[0]
                same = segments[1:] == segments[:-1]
                yield tokens[:-1], np.where(same, tokens[1:], NO_TARGET), segments[:-1]
                del text[:length], ids[:length]


def shard(batch: Batch, sharding: jax.sharding.Sharding) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Puts a batch onto the devices of `sharding`, of this and of all other processes.

    Every process makes the same batch (bytes are cheap) and hands over its own part of it.
    """

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return put(batch.tokens), put(batch.targets), put(batch.segment_ids)
