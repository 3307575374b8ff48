"""What an implementation must refuse on the GPU that is here. It must compute everything else."""

import jax
import pytest


def must_refuse(implementation, dtype):
    """What the message of the refusal must say, or None for what must be computed."""
    capability = float(jax.devices()[0].compute_capability)
    if implementation == "triton" and capability < 8:
        return f"Ampere.*{capability}"
    if implementation.startswith("mosaic_gpu"):
        if jax.__version_info__ < (0, 11):
            return "jax 0.11"
        if capability != 9.0:
            return f"Hopper.*{capability}"
        if dtype not in ("bfloat16", "float16"):
            return f"bfloat16 or float16, got q of {dtype}"
    return None


def result_unless_refused(future, implementation, dtype):
    """The result of a future; None, after a check of the message, for what must be refused.

    A refusal that is not listed above fails the test, as any other error does.
    """
    message = must_refuse(implementation, dtype)
    if message is None:
        return future.result()
    with pytest.raises(NotImplementedError, match=f"{implementation!r}.*{message}"):
        future.result()
    return None
