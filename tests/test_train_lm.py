"""examples/train_lm.py with small settings: in one process, and in two under jax.distributed."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

ROOT = Path(__file__).parent.parent
SETTINGS = ["--steps=2", "--sequence-length=512", "--document-length=200", "--layers=1"]
SETTINGS += ["--window=70", "--sinks=3", "--devices=4", "--sample-length=8", "--seed=5"]

OTHER_MODELS = ["sliding-window", "gemma-like"]


def start(output, *flags):
    drop = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = str(ROOT)
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is most of the time
    return subprocess.Popen(
        [sys.executable, "examples/train_lm.py", *SETTINGS, f"--output={output}", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    """What the processes wrote to stdout, all of which must succeed."""
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, out + err[-3000:]
    return [out for out, _ in outputs]


def losses(output):
    """The losses of the first and of the last of the two steps."""
    return [float(x) for x in re.search(r"loss: (\S+) at first, (\S+) at last", output).groups()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Output and PNG of one process with four devices."""
    picture = tmp_path_factory.mktemp("train_lm") / "new folder" / "curve.png"
    return finish(start(picture))[0], picture


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
    output = finish(start(tmp_path / "curve.png", f"--model={model}", *flags))[0]
    assert f"model: {model}" in output
    first, last = losses(output)
    assert last < first
    assert "--- and the model goes on ---" in output


@pytest.mark.parametrize(
    "name", ["gpt-oss-like", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHER_MODELS)]
)
def test_prompt_and_steps_give_the_logits_of_training(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--num-processes=2"]
    pictures = [tmp_path / f"{index}.png" for index in range(2)]
    zero, one = finish(
        *(start(pictures[i], *flags, f"--process-id={i}") for i in range(2)),
    )
    assert losses(zero) == pytest.approx(losses(one_process[0]), rel=1e-5)
    assert pictures[0].exists()
    assert not pictures[1].exists()
    assert "loss" not in one, "only the first process prints"


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
