"""Whether all contenders compute the model that ours computes."""

import math
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from benchmarks._gpus import hold
from benchmarks._model_contenders import CONTENDERS
from benchmarks._model_jobs import Job
from benchmarks.attention import difference, reason_of

MOST_OFF = 0.2
"""By which a parameter's bfloat16 gradient may differ from ours, as the norm of the difference over
that of the gradient."""


def check(job: Job, lock: Path, gpus: range, *, quick: bool) -> dict[str, Any]:
    """Loss and gradients by all contenders, against those of ours.

    Returns:
        For each contender its loss, and how far its gradients are off; or the reason why not.
    """
    training = job.training(quick=quick)

    def lowered(name):
        return _or_error(lambda: training.lower_gradients(name, job.batch, job.length))

    def compiled(program):
        return program if isinstance(program, Exception) else _or_error(program.compile)

    programs = {name: lowered(name) for name in CONTENDERS}
    with ThreadPoolExecutor(len(programs)) as pool:
        programs = dict(zip(programs, pool.map(compiled, programs.values()), strict=True))
    init = training.compile_init()
    found: dict[str, Any] = {}
    hold(lock, gpus)
    parameters, _ = init()
    words = training.words(job.batch, job.length)
    expected = None
    for name, program in programs.items():
        result = program
        if not isinstance(program, Exception):
            result = _or_error(lambda call=program.call: call(parameters, *words))
        if isinstance(result, Exception):
            found[name] = {"reason": reason_of(result)}
            continue
        loss, gradients = result
        expected = gradients if expected is None else expected
        off, where = max(_differences(gradients, expected))
        found[name] = {"loss": float(loss), "off": off, "most in": where}
        if off > MOST_OFF:
            found[name]["reason"] = f"its gradients are off ours by {off:.2g} in {where}"
    return found


def _or_error(function: Any) -> Any:
    """What the function returns, or what it raises, printed."""
    try:
        return function()
    except Exception as error:  # a contender may fail in any way; the check's table says how
        traceback.print_exc()
        return error


def _differences(gradients: Any, expected: Any) -> Iterator[tuple[float, str]]:
    """The relative norm of a difference of every parameter's gradient, and the parameter."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(gradients)
    for (path, leaf), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        off = difference(leaf, other)
        yield math.inf if math.isnan(off) else off, jax.tree_util.keystr(path)
