"""Real text for `train_lm.py`: Python's standard library, packed into long sequences.

Every installation of Python brings about ten megabytes of source text, so nothing is downloaded.
"""

import dataclasses
import pathlib
import sysconfig

import jax
import numpy as np

from _tokenizer import BEGIN, BEGIN_TEXT, BytePairs

NO_TARGET = -1
SUFFIXES = {".py", ".md", ".rst", ".txt"}
FEWEST_FILES = 40

# Installed packages are not the standard library; the others are mostly tables and test data.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
# Texts that are turned into tokens, and whose parts are mixed, at a time.
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Source files: those to train on, and those the model never sees."""

    train: list[str]
    held_out: list[str]
    held_out_names: list[str]


def load_corpus(folder: str | None = None) -> Corpus:
    """Reads text files; every twentieth is held out.

    Args:
        folder: where to look for files whose names end as in `SUFFIXES`; None takes the source
            files of Python's standard library.

    Raises:
        FileNotFoundError: there are hardly any.
    """
    if folder is None:
        root, suffixes, skipped = pathlib.Path(sysconfig.get_paths()["stdlib"]), {".py"}, _SKIPPED
        advice = "this Python comes without its source files: name a folder by --text"
    else:
        root, suffixes, skipped = pathlib.Path(folder), SUFFIXES, set[str]()
        advice = f"the text is what ends in {', '.join(sorted(SUFFIXES))}"
    names = sorted(
        path.relative_to(root)
        for path in root.rglob("*")
        if path.suffix in suffixes and not skipped & set(path.relative_to(root).parts)
    )
    texts = {str(name): (root / name).read_bytes().decode(errors="replace") for name in names}
    files = [(name, text) for name, text in texts.items() if text and BEGIN_TEXT not in text]
    if len(files) < FEWEST_FILES:
        raise FileNotFoundError(
            f"{len(files)} text files under {root}, at least {FEWEST_FILES} are needed: {advice}"
        )
    held_out = files[::20]
    train = [text for number, (_, text) in enumerate(files) if number % 20]
    return Corpus(train, [text for _, text in held_out], [name for name, _ in held_out])


def unigram_entropy(tokens: np.ndarray) -> float:
    """Nats per token of a model that knows how often each token occurs and nothing else."""
    counts = np.bincount(tokens)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences, each field an int32 array [batch, sequence]."""

    tokens: np.ndarray
    """The tokens."""
    targets: np.ndarray
    """The token after each of them, or NO_TARGET where that belongs to another document."""
    segment_ids: np.ndarray
    """Which document of the pack each token belongs to: 0, 1, 2, ..."""

    def put(self, sharding: jax.sharding.Sharding) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The three fields on the devices of `sharding`, of this and of all other processes.

        Every process has the same batch and hands over its own part of it.
        """

        def put(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return put(self.tokens), put(self.targets), put(self.segment_ids)


class PackedStream:
    """Documents one after the other without padding, for ever, read from front to back.

    Which tokens stand at a position depends on the arguments alone. A run that stopped can thus go
    on at the token where it stopped.

    Args:
        texts: the documents. In every epoch they, and their parts, follow each other in a new
            random order.
        tokenizer: turns them into tokens, when they are needed.
        document_length: a document of more tokens than this becomes several, so that a sequence
            does not hold one file only.
        seed: of the orders.
    """

    def __init__(self, texts: list[str], tokenizer: BytePairs, *, document_length: int, seed: int):
        self._texts = texts
        self._tokenizer = tokenizer
        self._document_length = document_length
        self._rng = np.random.default_rng(seed)
        self._order: list[int] = []
        self._encoded: dict[int, np.ndarray] = {}
        # The tokens from position `_start` on, and which document each of them belongs to.
        self._start = 0
        self._tokens = np.zeros(0, np.int32)
        self._documents = np.zeros(0, np.int32)
        self._count = 0

    def batch(self, start: int, rows: int, length: int) -> Batch:
        """The `rows` sequences that begin at token `start` of the stream, one after the other.

        Raises:
            ValueError: `start` lies before that of an earlier call.
        """
        if start < self._start:
            raise ValueError(f"token {start} was passed: the stream is at {self._start}")
        self._drop_before(start)
        while self._start + len(self._tokens) <= start + rows * length:  # the last one's target
            self._append(self._next_documents())
            self._drop_before(start)
        tokens, documents = self._tokens[: rows * length + 1], self._documents[: rows * length + 1]
        targets = np.where(documents[1:] == documents[:-1], tokens[1:], NO_TARGET)
        documents = documents[:-1].reshape(rows, length)
        return Batch(
            tokens[:-1].reshape(rows, length),
            targets.reshape(rows, length),
            documents - documents[:, :1],
        )

    def _next_documents(self) -> list[np.ndarray]:
        """The tokens of the next documents."""
        if not self._order:
            self._order = self._rng.permutation(len(self._texts)).tolist()
        taken, self._order = self._order[:_AT_ONCE], self._order[_AT_ONCE:]
        missing = [index for index in taken if index not in self._encoded]
        encoded = self._tokenizer.encode([self._texts[index] for index in missing])
        self._encoded.update(zip(missing, encoded, strict=True))
        return [self._encoded[index] for index in taken]

    def _append(self, documents: list[np.ndarray]) -> None:
        most = self._document_length - 1
        parts = [
            np.concatenate([np.asarray([BEGIN], np.int32), document[start : start + most]])
            for document in documents
            for start in range(0, len(document), most)
        ]
        # Neighbours of one long text would make batches that are too much alike.
        parts = [parts[index] for index in self._rng.permutation(len(parts))]
        numbers = self._count + np.arange(len(parts), dtype=np.int32)
        self._count += len(parts)
        self._tokens = np.concatenate([self._tokens, *parts])
        self._documents = np.concatenate(
            [self._documents, np.repeat(numbers, [len(part) for part in parts])]
        )

    def _drop_before(self, start: int) -> None:
        passed = min(start - self._start, len(self._tokens))
        self._tokens, self._documents = self._tokens[passed:], self._documents[passed:]
        self._start += passed
