"""The settings of an attention layer, checked, and the shapes that follow from them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
from jax.sharding import AbstractMesh, Mesh

from ring_swa_jax import _checks
from ring_swa_jax._axis import AxisName
from ring_swa_jax._exchange import check_exchange
from ring_swa_jax._layout import check_layout
from ring_swa_jax._query_scaling import QueryScaling
from ring_swa_jax._rope import Rope
from ring_swa_jax._window import WindowSize, static_causal_window, static_window

ACTIVATIONS = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """Settings of one layer, checked; `ring_swa_jax.nnx` says what they mean.

    The modules give them by name, so each is listed here once for all modules.
    """

    num_heads: int
    in_features: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    out_features: int
    window_size: WindowSize
    num_sink_tokens: int
    learned_sinks: bool
    logits_soft_cap: float | None
    scale: float | None
    qk_norm: bool | str
    qk_norm_epsilon: float
    qk_norm_scale: bool
    qk_norm_after_rope: bool
    value_norm: bool
    context_norm: bool
    rope: Rope | None
    query_scaling: QueryScaling | None
    attention_chunk_size: int | None
    key_as_value: bool
    kv_shared: bool
    output_gate: str | None
    output_gate_activation: str
    mesh: Mesh | AbstractMesh | None
    seq_axis: AxisName | None
    batch_axis: AxisName | None
    head_axis: AxisName | None
    layout: str
    exchange: str | None
    implementation: str | None

    @classmethod
    def create(cls, given: Mapping[str, Any]) -> Self:
        """The settings among what a module was given, by name; sizes that are None filled in.

        Raises:
            ValueError: sizes or settings that do not fit.
            TypeError: settings of another type.
        """
        settings = {field.name: given[field.name] for field in dataclasses.fields(cls)}
        num_heads, in_features = settings["num_heads"], settings["in_features"]
        if settings["head_dim"] is None:
            if num_heads < 1 or in_features % num_heads:
                raise ValueError(
                    f"num_heads={num_heads} does not divide in_features={in_features}; "
                    "give head_dim"
                )
            settings["head_dim"] = in_features // num_heads
        defaults = {
            "num_kv_heads": num_heads,
            "value_dim": settings["head_dim"],
            "out_features": in_features,
        }
        for name, size in defaults.items():
            settings[name] = size if settings[name] is None else settings[name]
        return cls(**settings)

    def __post_init__(self):
        for name in ("num_heads", "in_features", "num_kv_heads", "head_dim", "value_dim",
                     "out_features"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        static_window(self.window_size)
        _checks.static_sinks(self.num_sink_tokens)
        _checks.static_soft_cap(self.logits_soft_cap)
        _checks.static_scale(self.scale, self.head_dim)
        check_layout(self.layout)
        check_exchange(self.exchange)
        if self.qk_norm not in (False, True, "all_heads"):
            raise ValueError(f'qk_norm must be False, True or "all_heads", got {self.qk_norm!r}')
        self._check_rope()
        self._check_options()

    def _check_rope(self):
        if self.rope is None:
            return
        if not isinstance(self.rope, Rope):
            raise TypeError(f"rope must be a ring_swa_jax.Rope or None, got {self.rope!r}")
        if self.rope.rotary_dim is None and self.head_dim % 2:
            raise ValueError(
                f"rope turns pairs of features, but head_dim={self.head_dim} is odd; "
                "give Rope(rotary_dim=...) or rope=None"
            )
        if self.rope.rotary_dim is not None and self.rope.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rope.rotary_dim} is more than head_dim={self.head_dim}"
            )

    def _check_options(self):
        if self.query_scaling is not None and not isinstance(self.query_scaling, QueryScaling):
            raise TypeError(
                "query_scaling must be a ring_swa_jax.QueryScaling or None, "
                f"got {self.query_scaling!r}"
            )
        for name, known in (
            ("output_gate", (None, "headwise", "elementwise")),
            ("output_gate_activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.attention_chunk_size is not None:
            _checks.static_size("attention_chunk_size", self.attention_chunk_size)
            if self.window_size is not None or self.num_sink_tokens:
                raise ValueError(
                    f"attention_chunk_size={self.attention_chunk_size} is a mask of its own: it "
                    "goes with window_size=None and num_sink_tokens=0, not with "
                    f"{self.window_size} and {self.num_sink_tokens}"
                )
            if self.layout != "contiguous":
                raise ValueError(
                    f"attention_chunk_size={self.attention_chunk_size} counts tokens in their own "
                    f"order, got layout={self.layout!r}; use layout='contiguous'"
                )
        if self.key_as_value and self.value_dim != self.head_dim:
            raise ValueError(
                f"key_as_value=True makes values as wide as keys, but value_dim={self.value_dim} "
                f"and head_dim={self.head_dim}"
            )

    @property
    def norm_shapes(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Shapes of the factors that the norms of q and of k learn; None where there are none."""
        if not (self.qk_norm and self.qk_norm_scale):
            return None, None
        query: tuple[int, ...] = (self.head_dim,)
        key: tuple[int, ...] = (self.head_dim,)
        if self.qk_norm == "all_heads":
            query, key = (self.num_heads, *query), (self.num_kv_heads, *key)
        return query, None if self.kv_shared else key

    @property
    def projections(self) -> dict[str, tuple[int, int] | None]:
        """Heads and features of each projection of x, in the order of `Projected`; None: none."""
        key: tuple[int, int] | None = (self.num_kv_heads, self.head_dim)
        value: tuple[int, int] | None = (self.num_kv_heads, self.value_dim)
        gate_features = {None: None, "headwise": 1, "elementwise": self.value_dim}[self.output_gate]
        return {
            "query": (self.num_heads, self.head_dim),
            "key": None if self.kv_shared else key,
            "value": None if self.kv_shared or self.key_as_value else value,
            "gate": None if gate_features is None else (self.num_heads, gate_features),
        }

    @property
    def cached_window(self) -> int | None:
        """W of a cache: a chunk's keys lie in a window of its size."""
        if self.attention_chunk_size is not None:
            return self.attention_chunk_size - 1
        return static_causal_window(self.window_size, "decoding")
