"""The log of a run of `train_lm.py`: a JSON object a line, and the curve drawn from it."""

import json
import pathlib
from typing import Any


class Log:
    """Appends to a file of JSON lines; on other processes than the first it does nothing.

    Args:
        path: the file.
        writes: whether this process is the first one.
    """

    def __init__(self, path: pathlib.Path, *, writes: bool):
        self._path = path
        self._writes = writes

    def add(self, **values: Any) -> None:
        """One line."""
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def read_series(path: pathlib.Path, name: str) -> dict[int, float]:
    """A value of the log by step. Where a run went back to a checkpoint, the later line counts."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {line["step"]: line[name] for line in lines if name in line}
    return dict(sorted(found.items()))


def plot(log: pathlib.Path, entropy: float, path: pathlib.Path) -> None:
    """Draws training and held-out losses of a log.

    Args:
        log: its file.
        entropy: a line to compare with, in nats per token.
        path: the picture's file.
    """
    import matplotlib

    matplotlib.use("agg")  # works without a display
    from matplotlib import pyplot

    training, held_out = read_series(log, "loss"), read_series(log, "held_out_loss")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(list(training), list(training.values()), linewidth=0.8, label="training")
    axes.plot(list(held_out), list(held_out.values()), "o-", label="held-out files")
    axes.axhline(entropy, color="gray", linestyle="--", label=f"unigram entropy: {entropy:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
