"""A factor for queries that grows with the query's position."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import accumulator_dtype


@dataclasses.dataclass(frozen=True)
class QueryScaling:
    r"""Multiplies queries by a factor of their position p.

    .. math:: 1 + \beta \log(1 + \lfloor (p + o) / L \rfloor)

    The factor counters the flattening of the softmax as the number of keys grows past the training
    length. It is Ministral 3's ``llama_4_scaling_beta`` and, on layers without rotation, Llama 4's
    ``attn_temperature_tuning``.

    Attributes:
        beta: how fast the factor grows.
        original_length: L; the factor is one where p + o < L.
        offset: o, added to the position; 1 in Llama 4, which counts positions from one.

    References:
        Nakanishi, Scalable-Softmax Is Superior for Attention, arXiv:2501.19399.
    """

    beta: float
    original_length: int
    offset: int = 0

    def __post_init__(self):
        if isinstance(self.beta, bool) or not isinstance(self.beta, (int, float)):
            raise TypeError(f"beta must be a Python number, got {self.beta!r}")
        if not math.isfinite(self.beta):
            raise ValueError(f"beta must be finite, got {self.beta!r}")
        for name, least in (("original_length", 1), ("offset", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a Python int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def scale(
        self, x: Float[Array, "B S N H"], positions: Int[Array, "#B S"]
    ) -> Float[Array, "B S N H"]:
        """Queries x, each times the factor of its position, in the dtype of x."""
        wide = accumulator_dtype(x.dtype)
        periods = (positions + self.offset) // self.original_length
        factor = 1 + self.beta * jnp.log1p(periods.astype(wide))
        return (x.astype(wide) * factor[..., None, None]).astype(x.dtype)
