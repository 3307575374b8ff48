"""What a layer keeps of a sequence while it decodes: the keys and values of window and sinks.

The key of position p lies in slot ``p mod C`` of a buffer of C slots, so that a new token
overwrites the one that has just left the window and nothing else moves. The first tokens lie
apart, where nothing overwrites them. With heads first, a step is two batched matrix products on
the buffers as they lie; with slots first, XLA transposes all buffers in every step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import explicit_axes, mesh_of, reshard, spec_of
from ring_swa_jax._integers import as_segment_ids
from ring_swa_jax._segments import segment_starts
from ring_swa_jax._window import static_causal_window

MOST_TOKENS = 2**31 - 1  # that `Cache.length` can count
_FOLD_AT = 2**30


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


def init_cache(
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    window_size: int | None,
    num_sink_tokens: int = 0,
    max_length: int | None = None,
    max_trim: int = 1,
    value_dim: int | None = None,
    dtype=jnp.float32,
    relative_positions: bool = False,
) -> Cache:
    """An empty cache: ``C + num_sink_tokens`` keys and values a row, whatever will follow.

    Args:
        batch_size: number of rows, B.
        num_kv_heads: number of key/value heads, K.
        head_dim: H, of the keys.
        window_size: W, for **W + 1 keys**; None: all keys, which asks for ``max_length``. Static.
        num_sink_tokens: how many first tokens of its sequence a query always sees. Static.
        max_length: the most tokens a row will have. It saves memory where the window or the sinks
            are longer; results past it are then NaN. Otherwise nothing depends on it.
        max_trim: how many tokens `trim_cache` may take back at a time, for one more slot each; the
            first costs nothing. Static.
        value_dim: Hv, by default H.
        dtype: of the keys and values to come.
        relative_positions: keys will come unrotated, see `decode_attention`.

    Raises:
        ValueError: a size below 1, a negative window, or neither a window nor ``max_length``.
        TypeError: sizes that are not static integers, or a dtype that is not floating-point.
    """
    sizes = {
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "value_dim": head_dim if value_dim is None else value_dim,
    }
    heads, dim, value_dim = (_checks.static_size(*size) for size in sizes.items())
    batch = _checks.static_count("batch_size", batch_size)
    _checks.check_dtype("keys and values", dtype)
    window, slots, sinks = _plan(window_size, num_sink_tokens, max_length, max_trim)
    return Cache(
        key=jnp.zeros((batch, heads, slots, dim), dtype),
        value=jnp.zeros((batch, heads, slots, value_dim), dtype),
        sink_key=jnp.zeros((batch, heads, sinks, dim), dtype),
        sink_value=jnp.zeros((batch, heads, sinks, value_dim), dtype),
        length=jnp.zeros(batch, jnp.int32),
        trimmed=jnp.zeros(batch, jnp.int32),
        window_size=window,
        relative_positions=relative_positions,
    )


def prefill_cache(
    k: Float[AnyArray, "B S K H"],
    v: Float[AnyArray, "B S K Hv"],
    *,
    window_size: int | None,
    num_sink_tokens: int = 0,
    segment_ids: Int[AnyArray, "B S"] | None = None,
    max_length: int | None = None,
    max_trim: int = 1,
    relative_positions: bool = False,
) -> Cache:
    """The cache after a prompt, by gathers of as many keys as it holds.

    It computes no attention; the outputs come from another call, e.g. `ring_attention` on the same
    keys. (Cache-relative positions are those of the whole sequence up to
    ``num_sink_tokens + window_size``; a longer prompt gets its outputs and its cache from
    `decode_attention`, in chunks.)

    Args:
        k: keys of whole rows, as `decode_attention` would get them: rotated by their positions
            unless ``relative_positions``.
        v: values.
        window_size: W, for **W + 1 keys**; None: all keys, which asks for ``max_length``. Static.
        num_sink_tokens: how many first tokens of its sequence a query always sees. Static.
        segment_ids: as in `ring_attention`: a new sequence starts where the id changes, a negative
            id is padding, on either side. Each row's cache is that of its **last sequence**, which
            is the one that decoding goes on with; a row of padding gives an empty cache.
        max_length: as in `init_cache`; the prompt must fit where results depend on it.
        max_trim: as in `init_cache`.
        relative_positions: the keys are unrotated, see `decode_attention`.

    Raises:
        ValueError: shapes or settings that do not fit, or a prompt longer than ``max_length``.
        TypeError: dtypes that differ or are not floating-point, settings that are not static.
    """
    k, v = _checks.as_array("k", k), _checks.as_array("v", v)
    _checks.check_heads(k, k, v)
    batch, length = k.shape[:2]
    window, slots, sinks = _plan(window_size, num_sink_tokens, max_length, max_trim)
    if window is None and length > slots:
        raise ValueError(
            f"the prompt of {length} tokens does not fit into max_length={max_length}; use a "
            "larger max_length or cut the prompt's padding off"
        )
    if segment_ids is None:
        begin = jnp.zeros(batch, jnp.int32)
        count = jnp.full(batch, length, jnp.int32)
    else:
        segment_ids = as_segment_ids(segment_ids, (batch, length))
        real = segment_ids >= 0
        begin = jnp.where(real, segment_starts(segment_ids), 0).max(1)
        end = jnp.where(real, jnp.arange(1, length + 1, dtype=jnp.int32)[None], 0).max(1)
        count = end - begin

    def gather(x, positions):
        inside = (positions >= 0) & (positions < count[:, None])
        index = jnp.where(inside, begin[:, None] + positions, length)
        return _gather(x, index)

    if explicit_axes(k):
        spec = PartitionSpec(spec_of(k)[0])
        begin, count = (reshard(x, mesh_of(k), spec) for x in (begin, count))
    rolling = slot_positions(count, slots)
    first = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32)[None], (batch, sinks))
    return Cache(
        key=gather(k, rolling),
        value=gather(v, rolling),
        sink_key=gather(k, first),
        sink_value=gather(v, first),
        length=count,
        trimmed=jnp.zeros_like(count),
        window_size=window,
        relative_positions=relative_positions,
    )


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


def lie_as(x: Array, cache: Cache) -> Cache:
    """A new cache, cut over mesh axes and varying over manual ones as the keys [B, S, K, H] are."""
    batch, _, heads, _ = spec_of(x)
    varying = jax.typeof(x).manual_axis_type.varying

    def lie(part):
        if explicit_axes(x):
            spec = (batch, heads)[: 1 if part.ndim == 1 else 2]
            part = reshard(part, mesh_of(x), PartitionSpec(*spec))
        return lax.pcast(part, tuple(varying), to="varying") if varying else part

    return jax.tree.map(lie, cache)


def check_cache(cache) -> None:
    """Checks that it is a cache.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must come from init_cache or a prefill, got {type(cache)}")


def slot_positions(length: Int[Array, "B"], num_slots: int) -> Int[Array, "B C"]:
    """Position of the token in each slot after ``length`` tokens; negative for an empty slot."""
    last = length[:, None] - 1
    return last - (last - jnp.arange(num_slots, dtype=jnp.int32)[None]) % num_slots


def append_sinks(
    cache: Cache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    valid: Bool[Array, "B T"],
) -> Cache:
    """Stores only those of T more tokens that are sinks.

    Call `append_window` next, which stores the rest and counts all T.
    """
    sinks = cache.sink_key.shape[2]
    positions = next_positions(cache, k.shape[1], valid)
    slots = _slots_or_none(valid & (positions < sinks), positions, sinks)
    return dataclasses.replace(
        cache,
        sink_key=_scatter(cache.sink_key, slots, k),
        sink_value=_scatter(cache.sink_value, slots, v),
    )


def append_window(
    cache: Cache,
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    valid: Bool[Array, "B T"],
) -> Cache:
    """The cache with the last of T more tokens in its rolling buffer, and all of them counted."""
    num_slots, sinks = cache.num_slots, cache.sink_key.shape[2]
    positions = next_positions(cache, k.shape[1], valid)
    count = valid.sum(1, dtype=jnp.int32)
    if cache.max_length is None:
        kept = valid & (positions >= (cache.length + count - num_slots)[:, None])
    else:
        kept = valid & (positions < num_slots)
    slots = _slots_or_none(kept, positions % num_slots, num_slots)
    length = cache.length + jnp.minimum(count, MOST_TOKENS - cache.length)
    if cache.relative_positions and cache.max_length is None:
        # Past the sinks and one round of the buffer only the slot of the next token matters.
        settled = -(-(sinks + num_slots) // num_slots) * num_slots
        count_on = (length < _FOLD_AT) | (length == MOST_TOKENS)
        length = jnp.where(count_on, length, settled + length % num_slots)
    return dataclasses.replace(
        cache,
        key=_scatter(cache.key, slots, k),
        value=_scatter(cache.value, slots, v),
        length=length,
        trimmed=jnp.maximum(cache.trimmed - count, 0),
    )


def within_reach(cache: Cache, num_tokens: int, valid: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which new tokens still fit into ``max_length`` and into the int32 of ``length``."""
    limit = MOST_TOKENS if cache.max_length is None else cache.max_length
    rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    return rank < (limit - cache.length)[:, None]


def _gather(x: Float[Array, "B S K H"], index: Int[Array, "B C"]) -> Float[Array, "B K C H"]:
    """Rows of x, zeros where the index is past them, cut over batch and heads as x is."""

    def gather(x, index):
        rows = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, index)
        return jnp.swapaxes(rows, 1, 2)

    if not explicit_axes(x):
        return gather(x, index)
    batch, _, heads, _ = spec_of(x)
    return jax.sharding.auto_axes(gather, out_sharding=PartitionSpec(batch, heads))(x, index)


def _slots_or_none(
    kept: Bool[Array, "B T"], slots: Int[Array, "B T"], num_slots: int
) -> Int[Array, "B T"]:
    """The slot of each token that is kept.

    Tokens that are not kept get distinct indices past the buffer, which the scatter drops.
    """
    none = num_slots + jnp.arange(slots.shape[1], dtype=jnp.int32)[None]
    return jnp.where(kept, slots, none)


def _scatter(
    buffer: Float[Array, "B K C H"], slots: Int[Array, "B T"], tokens: Float[Array, "B T K H"]
) -> Float[Array, "B K C H"]:
    if buffer.shape[2] == 0:
        return buffer

    def put(buffer, slots, tokens):
        return buffer.at[:, slots].set(tokens, mode="drop", unique_indices=True)

    return jax.vmap(put)(buffer, slots, jnp.swapaxes(tokens, 1, 2))


def effective_window(window: int | None, num_sinks: int, max_length: int | None) -> int | None:
    """The window, None where each of ``max_length`` tokens sees all tokens before it."""
    all_seen = window is None or (max_length is not None and max(window, num_sinks) >= max_length)
    return None if all_seen else window


def _plan(window_size, num_sink_tokens, max_length, max_trim) -> tuple[int | None, int, int]:
    """(effective window, slots of the rolling buffer, slots of the sinks)."""
    window = static_causal_window(window_size, "a cache")
    sinks = _checks.static_sinks(num_sink_tokens)
    max_trim = _checks.static_size("max_trim", max_trim)
    if max_length is not None:
        max_length = _checks.static_size("max_length", max_length)
    if window is None and max_length is None:
        raise ValueError(
            "window_size=None keeps every key, so the cache needs a size: pass max_length, the "
            "most tokens that a row will have; got max_length=None"
        )
    window = effective_window(window, sinks, max_length)
    if window is None:
        return None, max_length, 0
    return window, window + max_trim, sinks
