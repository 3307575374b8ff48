"""A training step of a model with a contender's attention, compiled for a mesh."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks._model_contenders import attending_by
from benchmarks._model_decoder import Decoder
from benchmarks._model_sharding import TOKENS, spec_of

OPTIMIZER = optax.adamw(1e-4, weight_decay=0.1)
GPU_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Products by cuBLAS's own choice: a search would keep the GPUs busy that others are timed on.
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
    # It lets a launch write into the array that a scan stacks, although the launch fills only a
    # part of what another launch has begun.
    "xla_gpu_enable_dynamic_slice_fusion": False,
}
"""XLA's options, alike for all contenders."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step.

    Attributes:
        call: ``(parameters, moments, tokens, targets)`` to ``(parameters, moments, loss, norm)``;
            the first two are given up. The norm is that of all gradients.
        seconds: to trace, to lower and to compile, together.
    """

    call: Any
    seconds: float

    def memory(self) -> dict[str, int]:
        """Bytes of a device, by the compiler's account."""
        found = self.call.memory_analysis()
        return {
            "arguments": found.argument_size_in_bytes,
            "temporary": found.temp_size_in_bytes,
            "all": found.argument_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
            + found.temp_size_in_bytes,
        }


class Training:
    """A model on a mesh of the axes "data" and "seq"."""

    def __init__(self, decoder: Decoder, mesh: Mesh):
        self.decoder, self.mesh = decoder, mesh
        with jax.set_mesh(mesh):
            parameters, moments = jax.eval_shape(lambda: self._init(jax.random.key(0)))
            cut = jax.tree_util.tree_map_with_path(self._sharding, parameters)
        whole = NamedSharding(mesh, P())
        self.shardings = (
            cut,
            optax.tree_utils.tree_map_params(
                OPTIMIZER, lambda _, s: s, moments, cut, transform_non_params=lambda _: whole
            ),
        )
        self.types = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            (parameters, moments),
            self.shardings,
        )

    def _sharding(self, path: tuple[Any, ...], x: Any) -> NamedSharding:
        """Of a parameter: layers of a scan are not cut, tables are cut along their features."""
        name = path[0].key
        if name == "blocks":
            return NamedSharding(self.mesh, P(None, *spec_of(x.shape[1:])))
        axis = 1 if name in ("embedding", "output") else None
        return NamedSharding(self.mesh, spec_of(x.shape, axis))

    def _init(self, key: Array) -> tuple[Any, Any]:
        parameters = self.decoder.init(key)
        return parameters, OPTIMIZER.init(parameters)

    def compile_init(self) -> Any:
        """``()`` to random parameters and the optimizer's moments, on the devices."""
        with jax.set_mesh(self.mesh):
            init = jax.jit(lambda: self._init(jax.random.key(0)), out_shardings=self.shardings)
            return init.lower().compile()

    def words(self, batch: int, length: int) -> tuple[Array, Array]:
        """Random words, and the word after each."""
        words = np.random.default_rng(0).integers(
            self.decoder.size.vocabulary, size=(batch, length + 1), dtype=np.int32
        )
        sharding = NamedSharding(self.mesh, TOKENS)
        tokens, targets = (jax.device_put(x, sharding) for x in (words[:, :-1], words[:, 1:]))
        return tokens, targets

    def _gradients(self, parameters, tokens, targets):
        return jax.value_and_grad(self.decoder.loss)(parameters, tokens, targets)

    def _update(self, parameters, moments, tokens, targets):
        loss, gradients = self._gradients(parameters, tokens, targets)
        norm = optax.global_norm(gradients)
        updates, moments = OPTIMIZER.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, loss, norm

    def lower(self, contender: str, batch: int, length: int) -> "Lowered":
        """A step; neither parameters nor words need exist."""
        whole = NamedSharding(self.mesh, P())
        outputs = (*self.shardings, whole, whole)
        step = jax.jit(self._update, donate_argnums=(0, 1), out_shardings=outputs)
        return self._lowered(step, self.types, contender, batch, length)

    def lower_gradients(self, contender: str, batch: int, length: int) -> "Lowered":
        """``(parameters, tokens, targets)`` to loss and gradients."""
        outputs = NamedSharding(self.mesh, P()), self.shardings[0]
        function = jax.jit(self._gradients, out_shardings=outputs)
        return self._lowered(function, self.types[:1], contender, batch, length)

    def _lowered(self, function, types, contender, batch, length):
        sharding = NamedSharding(self.mesh, TOKENS)
        words = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding)
        begin = time.perf_counter()
        with jax.set_mesh(self.mesh), attending_by(contender):
            program = function.lower(*types, words, words)
        return Lowered(program, time.perf_counter() - begin)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A traced and lowered program, and the seconds that it took."""

    program: Any
    seconds: float

    def compile(self, options: dict[str, Any] | None = None) -> Step:
        """With XLA's options; by default those for GPUs, where there are some."""
        if options is None:
            options = {} if jax.default_backend() == "cpu" else GPU_OPTIONS
        begin = time.perf_counter()
        compiled = self.program.compile(compiler_options=options)
        return Step(compiled, self.seconds + time.perf_counter() - begin)
