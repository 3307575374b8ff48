"""Documents of tokens, packed into long sequences."""

import pathlib
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

NO_TARGET = -1


class Batch(NamedTuple):
    """Packed sequences, int32 arrays [batch, sequence]."""

    tokens: np.ndarray
    targets: np.ndarray  # the token after each, or NO_TARGET where a document ends
    segment_ids: np.ndarray  # which document of the sequence each token belongs to


def read_documents(path: pathlib.Path, vocabulary: int) -> list[np.ndarray]:
    """Documents from an .npz file with an array of integers for each.

    Raises:
        ValueError: no such file, or no tokens of a vocabulary of this size.
    """
    try:
        with np.load(path) as file:
            documents = list(file.values())
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read documents from {path}: {error}") from error
    for number, document in enumerate(documents):
        is_row = document.ndim == 1 and document.size > 0
        if not is_row or not np.issubdtype(document.dtype, np.integer):
            raise ValueError(
                f"document {number} of {path} should be a row of integers, at least one, "
                f"got {document.dtype}{list(document.shape)}"
            )
        if not 0 <= document.min() <= document.max() < vocabulary:
            raise ValueError(
                f"document {number} of {path} has tokens from {document.min()} to "
                f"{document.max()}, but the checkpoint's vocabulary has {vocabulary}: make the "
                "documents with its tokenizer"
            )
    if len(documents) < 2:
        raise ValueError(f"{path} has {len(documents)} documents: give at least two")
    return documents


def packed(
    documents: list[np.ndarray], *, batch_size: int, sequence_length: int, seed: int
) -> Iterator[Batch]:
    """Yields packed documents for ever, without padding, in a new random order in every epoch.

    The document that a sequence's end cuts goes on in the next one.
    """
    rng = np.random.default_rng(seed)
    size = batch_size * sequence_length
    tokens, numbers = np.zeros(0, np.int32), np.zeros(0, np.int32)
    count = 0
    while True:
        while tokens.size <= size:  # one more than a batch: its last token has a target too
            epoch = [documents[i] for i in rng.permutation(len(documents))]
            own = np.repeat(count + np.arange(len(epoch)), [document.size for document in epoch])
            tokens = np.concatenate([tokens, *epoch]).astype(np.int32)
            numbers = np.concatenate([numbers, own]).astype(np.int32)
            count += len(epoch)
        goes_on = numbers[1 : size + 1] == numbers[:size]
        targets = np.where(goes_on, tokens[1 : size + 1], NO_TARGET)
        fields = (x.reshape(batch_size, -1) for x in (tokens[:size], targets, numbers[:size]))
        yield Batch(*fields)
        tokens, numbers = tokens[size:], numbers[size:]
