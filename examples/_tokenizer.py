"""Byte pairs: the tokens of `train_lm.py`, learned from the text that it trains on."""

import functools
import pathlib
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# The token that opens every document, and its text, which no source file holds. The model can thus
# predict the first real token, and the sink tokens, which are a document's own first tokens, always
# include this one.
BEGIN, BEGIN_TEXT = 0, "\0"
# It and one token for each byte: with these alone every text can be written.
SMALLEST_VOCABULARY = 257


class BytePairs:
    """Turns text into tokens and tokens into text.

    Args:
        tokenizer: of the library `tokenizers`, as `train` and `load` make it.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> "BytePairs":
        """Learns the most frequent pairs of tokens, until there are `vocabulary` tokens."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BEGIN_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: pathlib.Path) -> "BytePairs":
        """Reads what `save` wrote."""
        return cls(Tokenizer.from_file(str(path)))

    def save(self, path: pathlib.Path) -> None:
        """Writes the tokenizer as JSON."""
        self._tokenizer.save(str(path))

    @functools.cached_property
    def json(self) -> str:
        """The tokenizer as JSON, to compare two of them by."""
        return self._tokenizer.to_str()

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self._tokenizer.get_vocab_size()

    @functools.cached_property
    def bytes_of_tokens(self) -> np.ndarray:
        """How many bytes each token stands for; none for BEGIN."""
        # Written in an alphabet that has one character for each byte.
        lengths = np.zeros(self.size, np.int32)
        for text, token in self._tokenizer.get_vocab().items():
            lengths[token] = len(text)
        lengths[BEGIN] = 0
        return lengths

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text."""
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def decode(self, tokens: np.ndarray) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(tokens.tolist())
