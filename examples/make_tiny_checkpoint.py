"""Makes a tiny random model in Hugging Face's format for finetune.py, and documents.

    python examples/make_tiny_checkpoint.py gemma3 tiny

writes tiny/checkpoint/config.json, tiny/checkpoint/model.safetensors and tiny/documents.npz. The
tokens are bytes and the documents source files of Python's own standard library. Nothing is
downloaded, and neither torch nor transformers is needed.
"""

import argparse
import json
import math
import pathlib
import sysconfig
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from _hugging_face.decoder import Decoder, create_decoder

VOCABULARY = 256
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": _COMMON
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": True,
    },
    "gpt-oss": _COMMON
    | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False,
    },
}


def shapes_of(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by its name."""
    shapes = decoder.shapes(VOCABULARY)
    for i, kind in enumerate(decoder.model_layers.layers):
        own = _attention_shapes(decoder.model_layers.kinds[kind])
        shapes |= {f"layers.{i}.self_attn.{name}": shape for name, shape in own.items()}
    head = "lm_head.weight"
    return {name if name == head else f"model.{name}": shape for name, shape in shapes.items()}


def _attention_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    features, head_dim = settings["in_features"], settings["head_dim"]
    queries, keys = (settings[name] * head_dim for name in ("num_heads", "num_kv_heads"))
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": features}
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (size, queries if name == "o_proj" else features)
        for name, size in outputs.items()
    }
    if settings["use_bias"]:
        shapes |= {f"{name}.bias": (size,) for name, size in outputs.items()}
    if settings.get("qk_norm"):
        shapes |= {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
    if settings.get("learned_sinks"):
        shapes["sinks"] = (settings["num_heads"],)
    return shapes


def random_tensors(decoder: Decoder, seed: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Tensors of which none is a silent zero or one, so that a model without them would show."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes_of(decoder).items():
        tensor = rng.standard_normal(shape)
        if "norm" in name:
            tensor = 1 - decoder.norm_offset + tensor / 10
        elif len(shape) == 1 or name.endswith("bias"):
            tensor /= 10
        else:  # experts are [expert, input, output], other weights [output, input]
            tensor /= math.sqrt(shape[-2 if ".experts." in name else -1])
        tensors[name] = tensor.astype(dtype)
    return tensors


def source_files(number: int) -> list[np.ndarray]:
    """Files of Python's standard library, as the bytes after a zero, which none of them holds.

    Raises:
        FileNotFoundError: this Python comes without them.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in sorted(root.glob("*.py"))]
    texts = [text for text in texts if b"\0" not in text][:number]
    if len(texts) < 2:
        raise FileNotFoundError(f"no source files in {root}: this Python comes without them")
    return [np.frombuffer(b"\0" + text, np.uint8) for text in texts]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("folder", type=pathlib.Path, help="to write to")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help=f"of it {default}"
    )
    parser.add_argument("--documents", type=int, default=100, help=f"how many {default}")
    parser.add_argument("--seed", type=int, default=0, help=default)
    args = parser.parse_args(arguments)

    config = CONFIGS[args.model] | {"torch_dtype": args.dtype}
    dtype = np.dtype(ml_dtypes.bfloat16 if args.dtype == "bfloat16" else np.float32)
    tensors = random_tensors(create_decoder(config), args.seed, dtype)
    try:
        documents = source_files(args.documents)
        checkpoint = args.folder / "checkpoint"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        np.savez(args.folder / "documents.npz", *documents)
    except OSError as error:
        raise SystemExit(f"cannot write to {args.folder}: {error}") from error
    size = sum(tensor.size for tensor in tensors.values())
    print(f"{checkpoint}: {config['model_type']}, {size:,} parameters in {args.dtype}")
    print(f"{args.folder / 'documents.npz'}: {len(documents)} documents")


if __name__ == "__main__":
    main()
