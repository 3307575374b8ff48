"""examples/train_lm.py with small settings: in one process, and in two under jax.distributed."""

import re

import pytest

from tests import processes

SETTINGS = ["--steps=2", "--sequence-length=512", "--document-length=200", "--layers=1"]
SETTINGS += ["--window=70", "--sinks=3", "--devices=4", "--sample-length=8", "--seed=5"]


def start(output, *flags):
    command = ["examples/train_lm.py", *SETTINGS, f"--output={output}", *flags]
    return processes.start(*command, **processes.CPU)


def losses(output):
    """The losses of the first and of the last of the two steps."""
    return [float(x) for x in re.search(r"loss: (\S+) at first, (\S+) at last", output).groups()]


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
    ],
)
def test_bad_flags_are_answered(flags, message, tmp_path):
    process = start(tmp_path / "curve.png", *flags)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert message in err
