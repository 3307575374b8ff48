"""examples/train_lm.py with small settings: in one process, and in two under jax.distributed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import processes
from tests.helpers.train_lm import losses, start

OTHER_MODELS = ["sliding-window", "gemma-like"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Output and PNG of one process with four devices."""
    picture = tmp_path_factory.mktemp("train_lm") / "new folder" / "curve.png"
    return processes.succeed([start(picture)])[0], picture


def test_example(one_process):
    output, picture = one_process
    ring, alone = re.search(r"first loss: (\S+) on 4 devices, (\S+) on one device", output).groups()
    assert float(ring) == pytest.approx(float(alone), rel=1e-5)
    first, last = losses(output)
    assert first == float(ring)
    assert last < first
    assert "unigram entropy: 3." in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "--- and the model goes on ---" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("gpt-oss-like", ["--layers=2", "--devices=2"]),
        ("gemma-like", ["--layers=6", "--devices=2"]),
    ],
)
def test_hybrids_learn_and_speak(model, flags, tmp_path):
    output = processes.succeed([start(tmp_path / "curve.png", f"--model={model}", *flags)])[0]
    assert f"model: {model}" in output
    first, last = losses(output)
    assert last < first
    assert "--- and the model goes on ---" in output


@pytest.mark.parametrize(
    "name", ["gpt-oss-like", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHER_MODELS)]
)
def test_prompt_and_steps_give_the_logits_of_training(name, monkeypatch):
    monkeypatch.syspath_prepend(str(processes.ROOT / "examples"))
    from _model import ByteTransformer, patterns

    pattern = [{**settings, "seq_axis": None} for settings in patterns(7)[name]]
    model = ByteTransformer(tuple(pattern), 1, rngs=nnx.Rngs(0))
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
    pictures = [tmp_path / f"{index}.png" for index in range(2)]
    zero, one = processes.succeed(
        [start(pictures[i], *flags, f"--process-id={i}") for i in range(2)]
    )
    assert losses(zero) == pytest.approx(losses(one_process[0]), rel=1e-5)
    assert pictures[0].exists()
    assert not pictures[1].exists()
    assert "loss" not in one, "only the first process prints"


def test_processes_with_other_settings_are_told(tmp_path):
    flags = [f"--coordinator=127.0.0.1:{processes.free_port()}", "--num-processes=2"]
    own = ("--sequence-length=512", "--sequence-length=1024")
    started = [start(tmp_path / "curve.png", *flags, own[n], f"--process-id={n}") for n in range(2)]
    for status, _, err in processes.outputs(started):
        assert status != 0
        assert "disagree on sequence_length: 512 in process 0, 1024 in process 1" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sequence-length=510"], "4 devices do not divide --sequence-length 510"),
        (["--num-processes=3"], "--devices 4 is not a multiple of --num-processes 3"),
        (["--steps=0"], "--steps 0: at least one"),
        (["--model=gpt-oss-like", "--layers=3"], "--layers 3: gpt-oss-like needs a multiple of 2"),
    ],
)
def test_bad_flags_are_answered(flags, message, tmp_path):
    process = start(tmp_path / "curve.png", *flags)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert message in err
