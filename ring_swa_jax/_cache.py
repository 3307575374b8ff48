"""What a layer keeps of a sequence while it decodes: the keys and values of window and sinks.

The key of position p lies in slot ``p mod C`` of a buffer of C slots, so that a new token
overwrites the one that has just left the window and nothing else moves. The first tokens lie
apart, where nothing overwrites them. With heads first, a step is two batched matrix products on
the buffers as they lie; with slots first, XLA transposes all buffers in every step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from pallas_kernels import vary_over, varying_axes
from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import explicit_axes, mesh_of, reshard, spec_of

MOST_TOKENS = 2**31 - 1  # that `Cache.length` can count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, as many as its next tokens can see. An immutable pytree.

    `flax.serialization` takes it too, once ``ring_swa_jax.nnx`` or ``ring_swa_jax.linen`` is
    imported.

    There are C = ``window_size + max_trim`` slots, or ``max_length`` where no token can leave the
    window before. Made by `init_cache` or `prefill_cache`, consumed and returned by
    `decode_attention`, which under jit writes in place where the cache is donated or carried by
    ``lax.scan``.

    Attributes:
        key: of the last C tokens, position p in slot ``p mod C``; slots without a token are unread.
        value: likewise.
        sink_key: of the first ``num_sink_tokens`` tokens, in order. Empty where the window never
            drops a token.
        sink_value: likewise.
        length: tokens seen by each row, which is the position of its next token. It stops at
            2**31 - 1, beyond which results are NaN. With ``relative_positions`` it is reduced by a
            multiple of C after 2**30, which changes no result.
        trimmed: of each row's tokens that `trim_cache` took back, how many still occupy a slot.
        window_size: W, of **W + 1 keys**; None: all keys that fit.
        relative_positions: the keys are not rotated, see `decode_attention`.
    """

    key: Float[Array, "B K C H"]
    value: Float[Array, "B K C Hv"]
    sink_key: Float[Array, "B K P H"]
    sink_value: Float[Array, "B K P Hv"]
    length: Int[Array, "B"]
    trimmed: Int[Array, "B"]
    window_size: int | None = dataclasses.field(metadata={"static": True})
    relative_positions: bool = dataclasses.field(metadata={"static": True})

    @property
    def num_slots(self) -> int:
        """C, the slots of the rolling buffer."""
        return self.key.shape[2]

    @property
    def max_length(self) -> int | None:
        """The most tokens a row may have; None where there may be any number."""
        return None if self.window_size is not None else self.num_slots

    @property
    def max_trim(self) -> int:
        """How many of a row's last tokens `trim_cache` may take back."""
        return self.num_slots - (self.window_size or 0)


def next_positions(
    cache: Cache, num_tokens: int, valid: Bool[AnyArray, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Positions of the next tokens of each row in its sequence, for their rotary embedding.

    Args:
        cache: what came before.
        num_tokens: how many will come, T.
        valid: False for padding, which takes up no position and gets 0; None: all are tokens.

    Raises:
        ValueError: ``valid`` is not [B, T].
        TypeError: it is not boolean, or the cache is none.
    """
    check_cache(cache)
    if valid is None:
        return cache.length[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None]
    valid = _checks.as_array("valid", valid)
    _checks.check_valid(valid, (cache.length.shape[0], num_tokens))
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    return jnp.where(valid, cache.length[:, None] + rank, 0)


def check_cache(cache) -> None:
    """Checks that ``cache`` is a `Cache`.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must come from init_cache or a prefill, got {type(cache)}")


def slot_positions(length: Int[Array, "B"], num_slots: int) -> Int[Array, "B C"]:
    """Position of the token in each slot after ``length`` tokens; negative for an empty slot."""
    last = length[:, None] - 1
    return last - (last - jnp.arange(num_slots, dtype=jnp.int32)[None]) % num_slots


def effective_window(window: int | None, num_sinks: int, max_length: int | None) -> int | None:
    """The window, None where each of ``max_length`` tokens sees all tokens before it."""
    all_seen = window is None or (max_length is not None and max(window, num_sinks) >= max_length)
    return None if all_seen else window


def lie_as(x: Array, cache: Cache) -> Cache:
    """A new cache, cut over mesh axes and varying over manual ones as the keys [B, S, K, H] are."""
    batch, _, heads, _ = spec_of(x)
    varying = varying_axes(x)

    def lie(part):
        if explicit_axes(x):
            spec = (batch, heads)[: 1 if part.ndim == 1 else 2]
            part = reshard(part, mesh_of(x), PartitionSpec(*spec))
        return vary_over(part, varying)

    return jax.tree.map(lie, cache)
