"""examples/finetune.py: a checkpoint is read, trained, and written back in the same format."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.helpers import processes
from tests.helpers.layers import quick

pytest.importorskip("safetensors")

MODELS = ["gemma3", "gpt-oss"]
# `compare_logits.theirs(folder, TOKENS)[0, -8:]` of the tiny models, transformers 5.24.0 and torch
# 2.13.0: the last eight tokens, for which the window is shorter than the row.
LOGITS = pathlib.Path(__file__).parent / "finetune_logits.npz"
TOKENS = (1 + np.arange(160, dtype=np.int32))[None]


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(processes.ROOT / "examples"))


def make(model, folder, *flags):
    """A tiny checkpoint, its decoder and the decoder's parameters."""
    import make_tiny_checkpoint

    from _hugging_face.checkpoint import Checkpoint
    from _hugging_face.decoder import create_decoder

    make_tiny_checkpoint.main([model, str(folder), "--documents=4", *flags])
    checkpoint = Checkpoint.read(folder / "checkpoint")
    decoder = create_decoder(checkpoint.config, seq_axis=None)
    return checkpoint, decoder, checkpoint.parameters(decoder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_what_was_not_trained_is_written_as_it_was_read(model, dtype, tmp_path):
    checkpoint, decoder, parameters = make(model, tmp_path, f"--dtype={dtype}")
    (checkpoint.folder / "tokenizer.json").write_text("{}")
    checkpoint.write(tmp_path / "new", decoder, parameters)
    new = type(checkpoint).read(tmp_path / "new")
    assert new.config == checkpoint.config
    assert (tmp_path / "new" / "tokenizer.json").exists()
    assert new.files.keys() == checkpoint.files.keys()
    assert new.tensors.keys() == checkpoint.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        assert new.tensors[name].dtype == tensor.dtype == dtype
        np.testing.assert_allclose(
            *(t.astype(np.float32) for t in (new.tensors[name], tensor)), atol=1e-6, rtol=1e-6
        )


def test_every_parameter_is_written(tmp_path):
    checkpoint, decoder, parameters = make("gpt-oss", tmp_path)
    more = jax.tree.map(lambda x: x + 1, parameters)
    checkpoint.write(tmp_path / "new", decoder, more)
    new = type(checkpoint).read(tmp_path / "new")
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_allclose(new.tensors[name], tensor + 1, rtol=1e-6)


def test_names_below_a_prefix_and_tensors_of_another_part(tmp_path):
    from safetensors.numpy import save_file

    checkpoint, decoder, _ = make("gemma3", tmp_path)
    tensors = {
        name.replace("model.", "model.language_model."): tensor
        for name, tensor in checkpoint.tensors.items()
    }
    tensors["model.vision_tower.weight"] = np.ones((2, 3), np.float32)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    save_file(tensors, checkpoint.folder / "model.safetensors")
    whole = {"model_type": "gemma3", "text_config": checkpoint.config}
    (checkpoint.folder / "config.json").write_text(json.dumps(whole))
    checkpoint = type(checkpoint).read(checkpoint.folder)
    parameters = checkpoint.parameters(decoder)
    more = jax.tree.map(lambda x: x + 1, parameters)
    checkpoint.write(tmp_path / "new", decoder, more)
    new = type(checkpoint).read(tmp_path / "new").tensors
    np.testing.assert_array_equal(new["model.vision_tower.weight"], 1)
    np.testing.assert_array_equal(
        new["lm_head.weight"], new["model.language_model.embed_tokens.weight"]
    )


def test_packed_documents_lose_no_token():
    from _hugging_face.documents import NO_TARGET, packed

    documents = [np.arange(10 * i, 10 * i + n) for i, n in enumerate([3, 7, 5])]
    batches = packed(documents, batch_size=2, sequence_length=4, seed=0)
    first, second = next(batches), next(batches)
    tokens = np.concatenate([first.tokens.ravel(), second.tokens.ravel()])[:15]
    assert sorted(tokens) == sorted(np.concatenate(documents))
    for batch in (first, second):
        ends = batch.targets == NO_TARGET
        np.testing.assert_array_equal(batch.targets[~ends], batch.tokens[~ends] + 1)
        same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
        np.testing.assert_array_equal(same, ~ends[:, :-1])


MISFITS = {
    "lacking": (lambda t, c: t.pop("model.norm.weight"), r"lacks norm.weight \(1 in all"),
    "unknown": (lambda t, c: t.update({"model.more": np.ones(2)}), "not understood: more"),
    "shape": (
        lambda t, c: t.update({"model.norm.weight": np.ones(2)}),
        r"other shapes: norm.weight \(2,\) instead of \(64,\)",
    ),
    "attention": (
        lambda t, c: t.pop("model.layers.0.self_attn.k_proj.weight"),
        "layer 0, 'local'.*'k_proj.weight'",
    ),
    "model": (lambda t, c: c.update(model_type="llama"), "'llama': there are decoders of gemma3"),
    "quantized": (lambda t, c: c.update(quantization_config={"bits": 4}), "bits.*dequantize"),
    "key": (lambda t, c: c.pop("hidden_size"), "config.json has no hidden_size"),
    "empty": (lambda t, c: t.clear(), r"not one tensor '\*embed_tokens.weight'"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_checkpoints_that_do_not_fit(change, message, tmp_path):
    from _hugging_face.decoder import create_decoder

    checkpoint, *_ = make("gemma3", tmp_path)
    change(checkpoint.files["model.safetensors"], checkpoint.config)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        checkpoint.parameters(create_decoder(checkpoint.config, seq_axis=None))


def test_files_that_are_missing_or_no_documents(tmp_path):
    from _hugging_face.checkpoint import Checkpoint
    from _hugging_face.documents import read_documents

    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*config.json"):
        Checkpoint.read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no file \*.safetensors"):
        Checkpoint.read(tmp_path)
    with pytest.raises(ValueError, match="cannot read documents"):
        read_documents(tmp_path / "none.npz", 256)
    np.savez(tmp_path / "documents.npz", np.arange(5), np.arange(0))
    with pytest.raises(ValueError, match=r"document 1 .* at least one, got int64\[0\]"):
        read_documents(tmp_path / "documents.npz", 256)
    np.savez(tmp_path / "documents.npz", np.arange(5), np.arange(300))
    with pytest.raises(ValueError, match=r"tokens from 0 to 299, but the .* vocabulary has 256"):
        read_documents(tmp_path / "documents.npz", 256)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a", "b"], "the following arguments are required: --output"),
        (["a", "b", "--output=a"], "--output a: the checkpoint's own folder"),
        (["a", "b", "--output=c", "--steps=0"], "--steps 0: at least one"),
    ],
)
def test_bad_flags_are_answered(flags, message, capsys):
    import finetune

    with pytest.raises(SystemExit, match="2"):
        finetune.parse_arguments(flags)
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers(model, tmp_path):
    *_, decoder, parameters = make(model, tmp_path)
    logits = quick(decoder)(parameters, TOKENS, np.zeros_like(TOKENS))
    np.testing.assert_allclose(logits[0, -8:], np.load(LOGITS)[model], atol=1e-4)


def tune(folder, *flags):
    """Starts the example for the checkpoint in a folder."""
    files = [folder / "checkpoint", folder / "documents.npz", f"--output={folder / 'finetuned'}"]
    sizes = ["--steps=3", "--sequence-length=512", "--batch-size=2", "--devices=4", "--data=2"]
    environment = processes.CPU | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return processes.start("examples/finetune.py", *files, *sizes, *flags, **environment)


@pytest.mark.slow
def test_errors_of_the_program_have_no_traceback(tmp_path):
    there = tmp_path / "there"
    make("gemma3", there)
    started = [
        tune(tmp_path),
        tune(there, "--data=3"),
        tune(there, "--sequence-length=511"),
        tune(there, "--implementation=mosaic_gpu"),
    ]
    messages = [
        "cannot read the checkpoint",
        "--data 3 does not divide the 4 devices",
        "2 devices do not divide --sequence-length 511",
        "implementation='mosaic_gpu'",
    ]
    for (status, _, error), message in zip(processes.outputs(started), messages, strict=True):
        assert status == 1
        assert error.startswith("finetune.py: error: ")
        assert message in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"), [("gemma3", []), ("gpt-oss", []), ("gpt-oss", ["--dtype=bfloat16"])]
)
def test_it_learns_and_transformers_reads_what_it_writes(model, flags, tmp_path):
    make(model, tmp_path)
    (output,) = processes.succeed([tune(tmp_path, *flags)])
    first, last = map(float, re.search(r"loss (\S+) at first, (\S+) at last", output).groups())
    assert last < first
    four, one = map(float, re.search(r"(\S+) on 4 devices, (\S+) on one", output).groups())
    assert four == pytest.approx(one, rel=1e-2 if flags else 1e-5)
    after, read = map(float, re.search(r"loss: (\S+), and (\S+) of what", output).groups())
    assert read == pytest.approx(after, rel=1e-5)
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    files = [tmp_path / "finetuned", tmp_path / "documents.npz", "--length=300"]
    started = processes.start("examples/compare_logits.py", *files, **processes.CPU)
    (output,) = processes.succeed([started])
    assert float(re.search(r"difference to transformers: (\S+)", output)[1]) < 1e-4
