"""Several runs of keys as one launch of a backward kernel: the halo's and the shard's own."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels._spec import KeyRun, Spec


def own_run(spec: Spec, runs: tuple[KeyRun, ...]) -> int | None:
    """Which run has the shard's own keys."""
    offsets = [run.offset for run in runs]
    return offsets.index(spec.first_key) if spec.first_key in offsets else None


def can_join(spec: Spec, runs: tuple[KeyRun, ...], key_tile: int) -> bool:
    """Whether one launch can take all runs: they are adjacent, and the own keys are among them.

    `joined` pads the first tile of keys, so no query may see this padding. Without a window two
    launches are better, as each can have its longest tasks first: they took 5% less time on an H100
    80GB.
    """
    if len(runs) == 1:
        return True
    ends = [run.offset + run.key.shape[1] for run in runs]
    begins = [run.offset for run in runs]
    if spec.window is None or spec.first_key not in begins or ends[:-1] != begins[1:]:
        return False
    return begins[0] % key_tile == 0 or begins[0] + spec.window <= 0


def joined(runs: tuple[KeyRun, ...], key_tile: int) -> KeyRun:
    """Adjacent runs as one, padded in front so that a tile of keys begins at position 0.

    Padding behind, which makes the length a multiple of 8 for TMA, is behind the last key of the
    sequence.
    """
    padding = runs[0].offset % key_tile
    length = padding + sum(run.key.shape[1] for run in runs)
    pad = ((0, 0), (padding, -length % 8), (0, 0), (0, 0))
    key, value = (
        jnp.pad(jnp.concatenate(x, axis=1), pad)
        for x in zip(*((run.key, run.value) for run in runs), strict=True)
    )
    return KeyRun(key, value, runs[0].offset - padding)


def split_by_runs(
    runs: tuple[KeyRun, ...], key_tile: int, gradients: list[Array]
) -> tuple[tuple[Float[Array, "B _ K H"], Float[Array, "B _ K Hv"]], ...]:
    """(dkey, dvalue) of each run, without those of padding in front and behind."""
    # Without this barrier, adding a halo's gradients in place crashes the compiler of jax 0.11.2.
    dkey, dvalue = lax.optimization_barrier(tuple(gradients))
    length = sum(run.key.shape[1] for run in runs)
    begin_of_all = runs[0].offset % key_tile if len(runs) > 1 else dkey.shape[1] - length
    found, end = [], begin_of_all + length
    for run in reversed(runs):
        begin = end - run.key.shape[1]
        found.append((dkey[:, begin:end], dvalue[:, begin:end]))
        end = begin
    return tuple(reversed(found))
