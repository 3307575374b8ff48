"""Scalings of the rotary frequencies, by which a model reaches past the length of its training."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float64


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    r"""Divides every frequency, which is to divide the positions: :math:`\theta_m / s`.

    Attributes:
        factor: s, at least 1.

    References:
        Chen et al., Extending Context Window of Large Language Models via Positional
        Interpolation, arXiv:2306.15595.
    """

    factor: float

    def __post_init__(self):
        _check_at_least("factor", self.factor, 1)

    def frequencies(
        self, frequencies: Float64[np.ndarray, "R"], base: float
    ) -> Float64[np.ndarray, "R"]:
        """The frequencies, all slower."""
        return frequencies / self.factor

    def magnitude(self) -> float:
        """Factor of the rotated features."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    r"""YaRN: divides the low frequencies, keeps the high ones, and blends between.

    Over the original length L, a frequency turns :math:`r = L \theta_m / 2\pi` times. Those with
    ``r >= beta_fast`` stay, those with ``r <= beta_slow`` are divided by ``factor``, and between
    the two the division fades in linearly with the index m, as in the authors' program and in all
    models (the paper's formula fades with r). The rotated queries and keys are multiplied by
    ``attention_factor``, which sharpens the logits by its square.

    Attributes:
        factor: s, by how much the context grows, at least 1.
        original_length: L, the context of the original training.
        beta_fast: turns from which on a frequency stays.
        beta_slow: turns up to which a frequency is divided.
        attention_factor: by default ``m(1)``, where ``m(a) = 0.1 * a * log(factor) + 1``, or, where
            both ``mscale`` and ``mscale_all_dim`` are given, ``m(mscale) / m(mscale_all_dim)``.
        truncate: whether the two ends of the blend are moved outwards to whole indices, as in the
            authors' program; False in gpt-oss.
        mscale: of DeepSeek's configurations, with ``mscale_all_dim``.
        mscale_all_dim: likewise.

    References:
        Peng et al., YaRN: Efficient Context Window Extension of Large Language Models,
        arXiv:2309.00071.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        _check_at_least("factor", self.factor, 1)
        _check_at_least("original_length", self.original_length, 1)
        _check_at_least("beta_slow", self.beta_slow, 0, strictly=True)
        _check_at_least("beta_fast", self.beta_fast, self.beta_slow, strictly=True)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                _check_at_least(name, getattr(self, name), 0, strictly=name == "attention_factor")

    def frequencies(
        self, frequencies: Float64[np.ndarray, "R"], base: float
    ) -> Float64[np.ndarray, "R"]:
        """The frequencies, the lower ones slower."""
        half = frequencies.size
        kept_to, divided_from = (
            half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            kept_to, divided_from = math.floor(kept_to), math.ceil(divided_from)
        # The authors' program clips to the numbers of features, not of their pairs.
        kept_to, divided_from = max(kept_to, 0), min(divided_from, 2 * half - 1)
        width = max(divided_from - kept_to, 1e-3)
        divided = np.clip((np.arange(half) - kept_to) / width, 0, 1)
        return frequencies * (1 - divided) + frequencies / self.factor * divided

    def magnitude(self) -> float:
        """Factor of the rotated features."""
        if self.attention_factor is not None:
            return self.attention_factor

        def m(scale):
            return 0.1 * scale * math.log(self.factor) + 1

        if self.mscale and self.mscale_all_dim:
            return m(self.mscale) / m(self.mscale_all_dim)
        return m(1)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    r"""Llama 3.1: divides the low frequencies, keeps the high ones, and blends between.

    Over the original length L, a frequency turns :math:`r = L \theta_m / 2\pi` times. Those with
    ``r >= high_freq_factor`` stay, those with ``r <= low_freq_factor`` are divided by ``factor``,
    and between the two the division fades in linearly with r.

    Attributes:
        factor: s, at least 1.
        original_length: L, the context of the original training.
        low_freq_factor: turns up to which a frequency is divided.
        high_freq_factor: turns from which on a frequency stays.

    References:
        Llama Team, The Llama 3 Herd of Models, arXiv:2407.21783; ``apply_scaling`` in
        https://github.com/meta-llama/llama-models.
    """

    factor: float = 8.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        _check_at_least("factor", self.factor, 1)
        _check_at_least("original_length", self.original_length, 1)
        _check_at_least("low_freq_factor", self.low_freq_factor, 0, strictly=True)
        _check_at_least(
            "high_freq_factor", self.high_freq_factor, self.low_freq_factor, strictly=True
        )

    def frequencies(
        self, frequencies: Float64[np.ndarray, "R"], base: float
    ) -> Float64[np.ndarray, "R"]:
        """The frequencies, the lower ones slower."""
        turns = self.original_length * frequencies / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / width, 0, 1)
        return frequencies * kept + frequencies / self.factor * (1 - kept)

    def magnitude(self) -> float:
        """Factor of the rotated features."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    r"""LongRoPE: divides each frequency by a factor of its own, :math:`\theta_m / s_m`.

    Models come with two sets of factors, for sequences up to the length of their first training
    and for longer ones. One set holds for all calls of a layer, so that a cache's keys agree with
    the queries that meet them.

    Attributes:
        factors: s, one for each pair of features.
        attention_factor: multiplies the rotated queries and keys, and so the logits by its square.

    References:
        Ding et al., LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens,
        arXiv:2402.13753.
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0

    def __post_init__(self):
        for factor in self.factors:
            _check_at_least("each of factors", factor, 0, strictly=True)
        _check_at_least("attention_factor", self.attention_factor, 0, strictly=True)

    def frequencies(
        self, frequencies: Float64[np.ndarray, "R"], base: float
    ) -> Float64[np.ndarray, "R"]:
        """The frequencies, each divided by its own factor."""
        if frequencies.size != len(self.factors):
            raise ValueError(
                f"LongRopeScaling has {len(self.factors)} factors, but {frequencies.size} pairs of "
                "features turn; give one factor for each pair"
            )
        return frequencies / np.asarray(self.factors)

    def magnitude(self) -> float:
        """Factor of the rotated features."""
        return self.attention_factor


@dataclasses.dataclass(frozen=True)
class ProportionalScaling:
    r"""Turns only the pairs of the highest frequencies, as Gemma 4's layers without a window do.

    Of the H/2 pairs the first ``int(fraction * H/2)`` turn, by :math:`\theta_m / s`, the others
    stay. (``Rope(rotary_dim=...)`` turns neighbouring features instead, by all the frequencies that
    fit between 1 and 1/base.)

    Attributes:
        fraction: of the pairs, in 0..1.
        factor: s, at least 1.
    """

    fraction: float
    factor: float = 1.0

    def __post_init__(self):
        _check_at_least("fraction", self.fraction, 0)
        if self.fraction > 1:
            raise ValueError(f"fraction must be in 0..1, got {self.fraction!r}")
        _check_at_least("factor", self.factor, 1)

    def frequencies(
        self, frequencies: Float64[np.ndarray, "R"], base: float
    ) -> Float64[np.ndarray, "R"]:
        """The frequencies, zero from the first pair on that stays."""
        turning = np.arange(frequencies.size) < int(self.fraction * frequencies.size)
        return frequencies * turning / self.factor

    def magnitude(self) -> float:
        """Factor of the rotated features."""
        return 1.0


RopeScaling = LinearScaling | YarnScaling | Llama3Scaling | LongRopeScaling | ProportionalScaling


def _check_at_least(name: str, value, least: float, *, strictly: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {value!r}")
    enough = value > least if strictly else value >= least
    if not (enough and math.isfinite(value)):
        relation = "more than" if strictly else "at least"
        raise ValueError(f"{name} must be finite and {relation} {least}, got {value!r}")
