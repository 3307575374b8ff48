"""examples/train_lm.py with small settings: in one process, and in two under jax.distributed."""

import json
import re
import shutil
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.helpers import processes
from tests.helpers.train_lm import losses, resume, start, start_as

sys.path.insert(0, str(processes.ROOT / "examples"))

from _data import NO_TARGET, PackedStream
from _flags import check, check_settings, make_parser
from _loss_scale import loss_scale, with_loss_scale
from _model import Size, Transformer, patterns
from _settings import LAPTOP, Settings, fitted
from _tokenizer import BEGIN, BytePairs

OTHER_MODELS = ["sliding-window", "gemma-like"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Output and folder of one process with four devices."""
    folder = tmp_path_factory.mktemp("train_lm") / "new folder"
    picture = folder / "elsewhere" / "curve.png"
    return processes.succeed([start(folder, f"--output={picture}")])[0], folder


def test_example(one_process):
    output, folder = one_process
    ring, alone = re.search(r"first loss: (\S+) on 4 devices, (\S+) on one device", output).groups()
    assert float(ring) == pytest.approx(float(alone), rel=1e-5)
    first, last = losses(output)
    assert first == pytest.approx(float(ring), rel=1e-5)
    assert last < first
    assert "compiling the training step of 512 tokens" in output
    assert "unigram entropy: " in output
    assert (folder / "elsewhere" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "--- and the model goes on ---" in output
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert [line["loss"] for line in lines[:2]] == pytest.approx([first, last], rel=1e-6)
    assert "held_out_loss" in lines[2]


def test_checkpoint_goes_on_speaking(one_process):
    folder = one_process[1]
    text, again = processes.succeed(
        [start_as("examples/sample.py", folder, "--prompt=def ", "--length=8") for _ in range(2)]
    )
    assert text == again
    assert text.startswith("def ")
    assert len(text) > len("def ") + 8 - 3


@pytest.fixture(scope="module")
def whole_and_stopped(tmp_path_factory):
    """The losses of a whole run, and the folder of one that was stopped before its last steps."""
    settings = ["--steps=6", "--short-length=256", "--short-share=0.7", "--batch-size=2"]
    settings += ["--checkpoint-every=2", "--evaluate-every=2"]
    folders = tmp_path_factory.mktemp("resume")
    whole = losses_of(folders / "whole", *settings)
    folder = folders / "stopped"
    process = start(folder, *settings)
    interrupt_after(process, folder, 3)
    output, error = process.communicate(timeout=240)
    assert process.returncode == 0, output + error
    assert "--- and the model goes on ---" in output
    assert 3 <= newest_checkpoint(folder) < 6, "interrupted in time"
    assert (folder / "loss.png").exists()
    return whole, folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--devices=8"], ["--devices=1"], ["--devices=4", "--data=2"]], ids="-".join
)
def test_resume_on_other_devices(flags, whole_and_stopped, tmp_path):
    """Stopped with short sequences, gone on with and with long ones: the same losses."""
    whole, stopped = whole_and_stopped
    folder = shutil.copytree(stopped, tmp_path / "run")
    resumed = processes.succeed([resume(folder, *flags)])[0]
    assert f"from step {newest_checkpoint(stopped)} on" in resumed
    assert read_losses(folder) == pytest.approx(whole, rel=1e-4)


def newest_checkpoint(folder):
    return max(int(path.name) for path in (folder / "checkpoints").iterdir())


def losses_of(folder, *flags):
    processes.succeed([start(folder, *flags)])
    return read_losses(folder)


def read_losses(folder):
    """The losses of all steps by the log; each step must be there once."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [loss for _, loss in found]


def interrupt_after(process, folder, step):
    """Ctrl-C, once so many steps are in the log."""
    log = folder / "log.jsonl"
    end = time.monotonic() + 200
    while not log.exists() or log.read_text().count('"loss"') < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("gpt-oss-like", ["--layers=2", "--devices=2", "--steps=6"]),
        ("gemma-like", ["--layers=6", "--devices=2"]),
        ("sliding-window", ["--preset=gpu", "--dtype=float16", "--devices=2"]),
    ],
)
def test_other_models_learn_and_speak(model, flags, tmp_path):
    output = processes.succeed([start(tmp_path / "run", f"--model={model}", *flags)])[0]
    assert f"model: {model}" in output
    first, last = losses(output)
    assert last < first
    assert "--- and the model goes on ---" in output


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("gpt-oss-like", *OTHER_MODELS)]
)
def test_prompt_and_steps_give_the_logits_of_training(name):
    pattern = [{**settings, "seq_axis": None, "batch_axis": None} for settings in patterns(7)[name]]
    size = Size(vocabulary=256, features=64, num_heads=2, num_kv_heads=1, head_dim=32)
    model = Transformer(size, tuple(pattern), 1, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (1, 40), 0, 256)

    @nnx.jit
    def both(model, tokens):
        logits, caches = model.prefill(tokens[:, :20], 40)
        found = [logits]
        for chunk in (tokens[:, 20:21], tokens[:, 21:]):
            logits, caches = model.decode(chunk, caches)
            found.append(logits)
        return jnp.concatenate(found, axis=1), model(tokens, jnp.zeros_like(tokens))

    got, want = both(model, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(one_process, tmp_path):
    flags = [f"--coordinator=127.0.0.1:{processes.free_port()}", "--num-processes=2"]
    folder = tmp_path / "run"
    zero, one = processes.succeed([start(folder, *flags, f"--process-id={i}") for i in range(2)])
    assert losses(zero) == pytest.approx(losses(one_process[0]), rel=1e-5)
    assert (folder / "loss.png").exists()
    assert "loss" not in one, "only the first process prints"
    resumed = processes.succeed([resume(folder, "--devices=2")])[0]
    assert "from step 2 on" in resumed


def test_processes_with_other_settings_are_told(tmp_path):
    flags = [f"--coordinator=127.0.0.1:{processes.free_port()}", "--num-processes=2"]
    own = ("--sequence-length=512", "--sequence-length=1024")
    started = [start(tmp_path / "run", *flags, own[n], f"--process-id={n}") for n in range(2)]
    for status, _, err in processes.outputs(started):
        assert status != 0
        assert "disagree on sequence_length: 512 in process 0, 1024 in process 1" in err


SETTINGS_OF_A_RUN = dict(LAPTOP, layers=3, sequence_length=512, short_length=256, batch_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 510}, "4 devices do not divide --sequence-length 510"),
        ({"short_length": 250}, "4 devices do not divide --short-length 250"),
        ({"model": "gpt-oss-like"}, "--layers 3: gpt-oss-like needs a multiple of 2"),
        ({"batch_size": 3}, "--data 2 does not divide --batch-size 3"),
        ({"sinks": 65}, "--sinks 65: a device holds 64 tokens of a sequence"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    settings = Settings(**SETTINGS_OF_A_RUN | changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_settings(settings, data=2, sequence_devices=4)


@pytest.mark.parametrize(
    ("memory", "dtype", "length"),
    [(80e9, "bfloat16", 65536), (24e9, "bfloat16", 16384), (15e9, "float16", 8192)],
)
def test_the_preset_for_gpus_fits_the_card(memory, dtype, length, monkeypatch):
    monkeypatch.setattr("_settings.half_precision_dtype", lambda: jnp.dtype(dtype))
    card = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": memory})
    settings = fitted("gpu", card, sequence_devices=4)
    assert (settings["sequence_length"], settings["dtype"]) == (4 * length, dtype)
    assert settings["short_length"] < settings["sequence_length"]
    assert fitted("laptop", card, sequence_devices=4) == LAPTOP


def step_with_loss_scale(optimizer, model, gradient):
    """One step with a gradient of the unscaled loss; returns whether the scale changed, and how."""
    before = loss_scale(optimizer)
    gradients = jax.tree.map(lambda x: jnp.full_like(x, gradient * before), nnx.state(model))
    optimizer.update(model, gradients)
    return float(loss_scale(optimizer) / before)


def test_loss_scaling_skips_steps_that_overflow(monkeypatch):
    monkeypatch.setattr("_loss_scale._GROWTH_INTERVAL", 2)
    models = [nnx.Linear(2, 3, rngs=nnx.Rngs(0)) for _ in range(2)]
    scaled = nnx.Optimizer(models[0], with_loss_scale(optax.adam(0.1)), wrt=nnx.Param)
    plain = nnx.Optimizer(models[1], optax.adam(0.1), wrt=nnx.Param)
    assert loss_scale(plain) == 1
    factors = []
    for gradient in (1e-3, jnp.inf, jnp.nan, 2e-3, 1e-3):
        factors.append(step_with_loss_scale(scaled, models[0], gradient))
        if jnp.isfinite(gradient):
            step_with_loss_scale(plain, models[1], gradient)
        np.testing.assert_allclose(models[0].kernel[...], models[1].kernel[...], rtol=1e-6)
    assert factors == [1, 0.5, 0.5, 1, 2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=0"], "argument --steps: 0 is less than 1"),
        (["--steps=many"], "argument --steps: invalid whole_number value: 'many'"),
        (["--learning-rate=-1"], "argument --learning-rate: -1 is not a number above zero"),
        (["--output=curve.doc"], "argument --output: curve.doc ends neither in .png"),
        (["--text=nowhere"], "--text nowhere: no such folder"),
        (["--resume=nowhere"], "--resume nowhere: no run is in this folder"),
        (["--process-id=0"], "--num-processes and --process-id need --coordinator"),
        (["--coordinator=host:1"], "--coordinator needs --num-processes and --process-id"),
        (
            ["--coordinator=host:1", "--num-processes=2", "--process-id=2"],
            "--process-id 2: there are 2, from 0",
        ),
        (
            ["--devices=4", "--coordinator=host:1", "--num-processes=3", "--process-id=2"],
            "--devices 4 is not a multiple of --num-processes 3",
        ),
    ],
)
def test_bad_flags_are_answered(flags, message, capsys):
    parser = make_parser(None)
    with pytest.raises(SystemExit) as ended:
        check(parser, parser.parse_args(flags))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_keeps_its_settings(one_process, capsys):
    folder = one_process[1]
    parser = make_parser(None)
    for flags, message in [
        ([f"--folder={folder}"], "holds a run: --resume it, or name another folder"),
        ([f"--resume={folder}", "--steps=3", "--window=5"], "leave out --window, --steps"),
    ]:
        with pytest.raises(SystemExit):
            check(parser, parser.parse_args(flags))
        assert message in capsys.readouterr().err


def test_the_program_itself_answers_in_the_same_form(tmp_path):
    process = start(tmp_path / "run", "--sequence-length=510")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert err.startswith("usage: ")
    assert "error: 4 devices do not divide --sequence-length 510" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_stream_goes_on_where_another_one_would():
    """Batches read from any step on, and what each document's first token and targets are."""
    tokenizer = BytePairs.train(["abc abd", "bcd"], 257)
    texts = ["abcdefghij", "kl", "mnopqrs"]
    options = {"document_length": 5, "seed": 1}
    stream = PackedStream(texts, tokenizer, **options)
    rows = [stream.batch(14 * i, 2, 7) for i in range(4)]
    late = PackedStream(texts, tokenizer, **options).batch(28, 2, 7)
    for name in ("tokens", "targets", "segment_ids"):
        np.testing.assert_array_equal(getattr(late, name), getattr(rows[2], name))
    with pytest.raises(ValueError, match="token 0 was passed"):
        stream.batch(0, 2, 7)
    tokens = np.concatenate([row.tokens.ravel() for row in rows])
    starts = np.flatnonzero(tokens == BEGIN)
    assert np.diff(starts).max() <= 5
    # An epoch: 19 letters, and BEGIN before each of the six parts of at most four.
    assert sorted(tokenizer.decode(tokens[:25])) == sorted("".join(texts))
    for row in rows:
        inside = row.targets != NO_TARGET
        assert (row.tokens[:, 1:][~inside[:, :-1]] == BEGIN).all()
        np.testing.assert_array_equal(
            row.targets[:, :-1][inside[:, :-1]], row.tokens[:, 1:][inside[:, :-1]]
        )
        np.testing.assert_array_equal(
            np.diff(row.segment_ids), (row.tokens[:, 1:] == BEGIN).astype(int)
        )


def test_byte_pairs_write_every_text(tmp_path):
    tokenizer = BytePairs.train(["def f(x):\n    return x\n" * 9], 270)
    text = "def g(y):\n\treturn 'ä€😀'  # \r\n"
    (tokens,) = tokenizer.encode([text])
    assert tokenizer.decode(tokens) == text
    assert tokenizer.bytes_of_tokens[tokens].sum() == len(text.encode())
    tokenizer.save(tmp_path / "tokenizer.json")
    assert BytePairs.load(tmp_path / "tokenizer.json").json == tokenizer.json
