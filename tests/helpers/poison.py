"""Kernels whose outputs start as NaN, so that an element that is never written shows."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def poisoned_outputs():
    """Every kernel traced inside gets NaN buffers to write its outputs into."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "pallas_call", _poisoning(pl.pallas_call))
        patch.setattr(plgpu, "kernel", _poisoning_mosaic(plgpu.kernel))
        jax.clear_caches()  # no trace from before, and none left behind
        yield
    jax.clear_caches()


def _poisoning(pallas_call):
    def call(kernel, *, in_specs, out_specs, out_shape, input_output_aliases=None, **options):
        aliases = dict(input_output_aliases or {})
        shapes, specs = jax.tree.leaves(out_shape), jax.tree.leaves(out_specs)
        fresh = [n for n in range(len(shapes)) if n not in aliases.values()]
        inputs = len(in_specs)

        def without_poison(*refs):
            kernel(*refs[:inputs], *refs[inputs + 1 :])

        def run(*arrays):
            taken = len(jax.tree.leaves(arrays))
            return pallas_call(
                without_poison,
                in_specs=[*in_specs, tuple(specs[n] for n in fresh)],
                out_specs=out_specs,
                out_shape=out_shape,
                input_output_aliases=aliases | {taken + i: n for i, n in enumerate(fresh)},
                **options,
            )(*arrays, tuple(_nan(shapes[n]) for n in fresh))

        return run

    return call


def _poisoning_mosaic(kernel):
    def call(body, *, out_type, **options):
        def run(*arrays):
            refs = [jax.new_ref(jnp.full(x.shape, jnp.nan, x.dtype)) for x in out_type]
            kernel(body, out_type=(), **options)(*arrays, *refs)
            return [jax.freeze(ref) for ref in refs]

        return run

    return call


def _nan(shape):
    full = jnp.full(shape.shape, jnp.nan, shape.dtype)
    axes = tuple(shape.manual_axis_type.varying) if shape.manual_axis_type is not None else ()
    return lax.pcast(full, axes, to="varying") if axes else full
