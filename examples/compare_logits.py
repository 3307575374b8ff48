"""Compares the logits of transformers with those of finetune.py's decoder, for one checkpoint.

    python examples/compare_logits.py tiny/finetuned tiny/documents.npz

This needs torch and transformers: pip install torch transformers.
"""

import argparse
import pathlib

import jax
import numpy as np

from _hugging_face.checkpoint import Checkpoint
from _hugging_face.decoder import create_decoder
from _hugging_face.documents import read_documents


def ours(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, vocabulary] of whole documents."""
    checkpoint = Checkpoint.read(folder)
    decoder = create_decoder(checkpoint.config, seq_axis=None)
    return np.asarray(
        jax.jit(decoder)(checkpoint.parameters(decoder), tokens, np.zeros_like(tokens))
    )


def theirs(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """The same from transformers, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def main() -> None:
    """Prints the greatest difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("documents", type=pathlib.Path)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the first document")
    args = parser.parse_args()
    try:
        document = read_documents(args.documents, vocabulary=2**31)[0][None, : args.length]
        got, want = (f(args.checkpoint, document.astype(np.int32)) for f in (ours, theirs))
    except (ValueError, NotImplementedError, ImportError) as error:
        raise SystemExit(f"compare_logits.py: error: {error}") from error
    difference = np.abs(got - want).max()
    print(f"{document.size} tokens: logits up to {np.abs(want).max():.2f}")
    print(f"greatest difference to transformers: {difference:.1e}")


if __name__ == "__main__":
    main()
