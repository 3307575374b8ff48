r"""Angles :math:`p \cdot \theta` modulo 2 pi at any integer position p.

A product of two float32 is off by 0.03 at :math:`p = 2^{20}` and noise at :math:`p = 2^{24}`. So
angles are counted here in turns, as fixed-point fractions of one turn in unsigned words: sums and
products of words wrap around, which drops whole turns and nothing else. A position is a sum of
bytes, :math:`p = \sum_k 256^k p_k`, and the fraction of a turn that belongs to :math:`256^k` steps
is computed on the host, once for each frequency, with Python's long integers.
"""

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

_BITS = 256
_PER_RADIAN = 0x28BE60DB9391054A7F09D5F47D4D377036D8A5664F10E4107F9458EAF7AEF158
"""Turns in a radian, 1 / (2 pi), as a fixed-point number of 256 bits."""


def angles(
    positions: Int[Array, "*shape"], frequencies: Sequence[float], dtype
) -> Float[Array, "*shape R"]:
    """``positions * frequencies`` modulo 2 pi, off by 7e-7 in float32 and by 1e-15 in float64.

    Angles below 1 are plain products, whose error is relative.

    Args:
        positions: of any integer dtype, negative ones too.
        frequencies: radians a step, taken as the exact float64 that they are.
        dtype: float32 or float64, of the angles.
    """
    word = jnp.uint64 if dtype == jnp.float64 else jnp.uint32
    bits = jnp.iinfo(word).bits
    position_bits = jnp.iinfo(positions.dtype).bits
    shape = (1,) * positions.ndim + (-1,)
    turns = jnp.zeros((), word)
    for shift in range(0, position_bits, 8):
        # The last byte keeps its sign: arithmetic shifts repeat it, and words wrap around.
        byte = positions >> shift
        byte = byte if shift + 8 == position_bits else byte & 255
        step = np.array(_fractions(tuple(frequencies), shift, bits), word).reshape(shape)
        turns = turns + byte[..., None].astype(word) * step
    signed = turns.astype(jnp.int64 if bits == 64 else jnp.int32)
    angle = signed.astype(dtype) * (2 * math.pi / 2**bits)
    product = positions[..., None].astype(dtype) * np.array(frequencies, dtype).reshape(shape)
    return jnp.where(jnp.abs(product) < 1, product, angle)


@functools.lru_cache(maxsize=512)
def _fractions(frequencies: tuple[float, ...], shift: int, bits: int) -> tuple[int, ...]:
    """What ``2**shift`` steps turn by, in turns rounded to ``bits`` bits, without whole turns."""
    found = []
    for frequency in frequencies:
        numerator, denominator = frequency.as_integer_ratio()
        turns = (_PER_RADIAN * numerator << shift) // denominator
        found.append((turns + (1 << _BITS - bits - 1) >> _BITS - bits) % (1 << bits))
    return tuple(found)
