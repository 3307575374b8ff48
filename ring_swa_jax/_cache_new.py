"""New caches: empty, or after a prompt."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from ring_swa_jax import _checks
from ring_swa_jax._arrays import AnyArray
from ring_swa_jax._axis import explicit_axes, mesh_of, reshard, spec_of
from ring_swa_jax._cache import Cache, effective_window, slot_positions
from ring_swa_jax._integers import as_segment_ids
from ring_swa_jax._segments import segment_starts
from ring_swa_jax._window import WindowSize, static_causal_window


def init_cache(
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    window_size: WindowSize,
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
    window_size: WindowSize,
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


def _gather(x: Float[Array, "B S K H"], index: Int[Array, "B C"]) -> Float[Array, "B K C H"]:
    """Rows of x, zeros where the index is past them, cut over batch and heads as x is."""

    def gather(x, index):
        rows = jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, index)
        return jnp.swapaxes(rows, 1, 2)

    if not explicit_axes(x):
        return gather(x, index)
    batch, _, heads, _ = spec_of(x)
    return jax.sharding.auto_axes(gather, out_sharding=PartitionSpec(batch, heads))(x, index)
