"""Portable implementation in plain XLA: O(T * W) work, no buffer larger than its arguments.

Query tiles in an outer loop, the key tiles that each one sees in an inner loop with an online
softmax (Milakov and Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). Where the tile
size does not divide a range, its last tile is moved back to end with the range, and what it
shares with its neighbour is masked, so nothing is padded.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from pallas_kernels._kernels import BackwardInputs, ForwardInputs, Gradients, Kernels
from pallas_kernels._logits import delta_of
from pallas_kernels._masks import is_real, sees, sees_behind_halo, sees_fetched_sink
from pallas_kernels._slices import slice_in_dim, update_in_dim
from pallas_kernels._spec import KeyRun, SinkRun, Spec, Starts, State, accumulator_dtype
from pallas_kernels._tile_ranges import key_plan
from pallas_kernels._tiles import Tiles
from pallas_kernels._varying import full_like_varying


def xla_tiles(window: int | None) -> Tiles:
    """About as long as the window, so that the two edges of a range are not most of it."""
    reach = 256 if window is None else window + 1
    size = min(256, max(64, 1 << (reach - 1).bit_length()))
    return Tiles(size, size)


def forward(
    spec: Spec,
    inputs: ForwardInputs,
    state: State | None,
    *,
    rows: tuple[int, int],
    resume: bool,
    out_dtype: jnp.dtype,
) -> State:
    """As `Kernels.forward`."""
    query, runs, sinks, sink_logits, start = inputs
    runs = _joined(runs)
    dtype = accumulator_dtype(query.dtype)
    offsets = tuple(run.offset for run in runs)
    if state is None:
        batch, length, heads, _ = query.shape
        out_shape = (batch, length, heads, runs[0].value.shape[-1])
        state = State(
            full_like_varying(query, out_shape, 0, out_dtype),
            full_like_varying(query, (batch, heads, length), 0, dtype),
        )

    def one_row(bounds, query, keys, sinks, sink_logits, out, lse):
        start, plans = bounds
        keys = _without_padding(keys, offsets, start)
        num_kv = keys[0][0].shape[1]
        q, grouped_out = _group(query, num_kv), _group(out, num_kv)
        grouped_lse = _group_rows(lse, num_kv)

        def query_tile(t, state):
            tile = _query_tile(spec, t, rows, start)
            q_tile = tile.rows_of(q)
            out_before = tile.rows_of(state.out)
            lse_before = tile.rows_of(state.lse, axis=2)
            if resume:
                carry = (
                    jnp.moveaxis(out_before, 0, 2).astype(dtype),
                    lse_before,
                    jnp.where(lse_before == -jnp.inf, 0, 1).astype(dtype),
                )
            else:
                carry = _initial_softmax(q_tile, out.shape[-1], sink_logits, dtype)

            def visit(keys, carry):
                return _softmax_step(spec, q_tile, keys, carry)

            for (key, value), offset, plan in zip(keys, offsets, plans, strict=True):
                run = KeyRun(key, value, offset)
                carry = _over_keys(spec, tile, run, plan[t], visit, carry)
            if sinks is not None:
                carry = visit(_sink_keys(spec, tile, sinks, start), carry)
            acc, row_max, row_sum = carry
            has_keys = row_sum > 0
            row_sum = jnp.where(has_keys, row_sum, 1)
            new_out = jnp.moveaxis(jnp.where(has_keys, 1 / row_sum, 0)[..., None] * acc, 2, 0)
            new_lse = jnp.where(has_keys, row_max + jnp.log(row_sum), -jnp.inf)
            return State(
                tile.put(state.out, new_out.astype(out.dtype), out_before),
                tile.put(state.lse, new_lse, lse_before, axis=2),
            )

        state = lax.fori_loop(
            0, _num_query_tiles(spec, rows), query_tile, State(grouped_out, grouped_lse)
        )
        return State(state.out.reshape(out.shape), state.lse.reshape(lse.shape))

    bounds = (start, _plans(spec, runs, start, rows))
    keys = tuple((run.key, run.value) for run in runs)
    return _each_row(one_row, bounds)(query, keys, sinks, sink_logits, *state)


def backward(
    spec: Spec,
    inputs: BackwardInputs,
    dquery: Float[Array, "B R0 N H"] | None,
    *,
    rows: int,
    dquery_dtype: jnp.dtype,
    dkey_dtype: jnp.dtype,
) -> Gradients:
    """As `Kernels.backward`."""
    query, runs, sinks, start, out, dout, lse = inputs
    runs = _joined(runs)
    dtype = lse.dtype
    offsets = tuple(run.offset for run in runs)
    batch, _, heads, dim = query.shape
    delta = delta_of(out[:, :rows], dout[:, :rows], dtype)
    if start.ndim:
        real = is_real(jnp.arange(rows, dtype=jnp.int32)[None], start[:, :rows])
        delta = jnp.where(real[:, None], delta, 0)
    if dquery is None:
        total = full_like_varying(query, (batch, rows, heads, dim), 0, dtype)
    else:
        total = jnp.pad(dquery, ((0, 0), (0, rows - dquery.shape[1]), (0, 0), (0, 0)))

    def one_row(bounds, query, keys, sinks, dout, lse, delta, dquery):
        start, plans = bounds
        keys = _without_padding(keys, offsets, start)
        ((query, dout),) = _without_padding(((query, dout),), (0,), start)
        num_kv = keys[0][0].shape[1]
        q, do, dq = (_group(x, num_kv) for x in (query, dout, dquery))
        lse, delta = (_group_rows(x, num_kv) for x in (lse, delta))

        def zeros(x):
            # Zeros that wait for x: else those of all hops of a halo may be made, and kept, at
            # the start of the program.
            one = x.reshape(-1)[0]
            return jnp.broadcast_to(jnp.where(one == one, 0, 1).astype(dtype), x.shape)

        def query_tile(t, carry):
            dq, dkeys, dsinks = carry
            tile = _query_tile(spec, t, (0, rows), start)
            dq_before = tile.rows_of(dq)
            q_tile = tile.rows_of(q)
            rest = (tile.rows_of(do), tile.rows_of(lse, axis=2), tile.rows_of(delta, axis=2))

            def visit(keys, carry):
                dq_tile, dk, dv = carry
                dq_part, dk_part, dv_part = _gradients(spec, q_tile, *rest, keys)
                return (
                    dq_tile + dq_part,
                    _add_rows(dk, dk_part, keys.begin),
                    _add_rows(dv, dv_part, keys.begin),
                )

            dq_tile, new_dkeys = dq_before, []
            for (key, value), offset, plan, dkey in zip(keys, offsets, plans, dkeys, strict=True):
                run = KeyRun(key, value, offset)
                dq_tile, *dkey = _over_keys(spec, tile, run, plan[t], visit, (dq_tile, *dkey))
                new_dkeys.append(tuple(dkey))
            if sinks is not None:
                sink_keys = _sink_keys(spec, tile, sinks, start)
                dq_tile, *dsinks = visit(sink_keys, (dq_tile, *dsinks))
                dsinks = SinkRun(*dsinks)
            return tile.put(dq, dq_tile, dq_before), tuple(new_dkeys), dsinks

        begin = (
            dq,
            tuple((zeros(key), zeros(value)) for key, value in keys),
            None if sinks is None else SinkRun(*map(zeros, sinks)),
        )
        dq, dkeys, dsinks = lax.fori_loop(0, _num_query_tiles(spec, (0, rows)), query_tile, begin)
        dkeys = tuple((dk.astype(dkey_dtype), dv.astype(dkey_dtype)) for dk, dv in dkeys)
        return dq.reshape(dquery.shape).astype(dquery_dtype), dkeys, dsinks

    bounds = (start, _plans(spec, runs, start, (0, rows)))
    keys = tuple((run.key, run.value) for run in runs)
    dquery, dkeys, dsinks = _each_row(one_row, bounds)(query, keys, sinks, dout, lse, delta, total)
    return Gradients(dquery, _by_runs(inputs.runs, dkeys), dsinks, delta)


class XlaKernels:
    """The backend "xla": it computes everything, on every device."""

    name = "xla"

    def check(
        self, spec: Spec, query: Float[Array, "B T N H"], value: Float[Array, "B T K Hv"]
    ) -> None:
        """Nothing is beyond it."""
        del spec, query, value

    def query_tile_rows(self, spec: Spec, query: Float[Array, "B T N H"], run: KeyRun) -> int:
        """Launches may begin at any row."""
        del spec, query, run
        return 1

    @property
    def prefers_fused_halo_forward(self) -> bool:
        """One launch is half the program to compile."""
        return True

    def prefers_fused_halo_backward(self, spec: Spec, inputs: BackwardInputs) -> bool:
        """One launch is half the program to compile."""
        del spec, inputs
        return True

    forward = staticmethod(forward)
    backward = staticmethod(backward)


KERNELS: Kernels = XlaKernels()


class _QueryTile(NamedTuple):
    """A slice of the queries: where it begins, its positions, and which of them are its own."""

    begin: Int[Array, ""]
    positions: Int[Array, "Q"]
    start: Int[Array, "Q"] | Int[Array, ""]
    own: Bool[Array, "Q"]

    def rows_of(self, x: Float[Array, "..."], axis: int = 0) -> Float[Array, "..."]:
        return slice_in_dim(x, self.begin, self.positions.size, axis)

    def put(
        self,
        x: Float[Array, "*whole"],
        new: Float[Array, "*tile"],
        before: Float[Array, "*tile"],
        axis: int = 0,
    ) -> Float[Array, "*whole"]:
        own = self.own.reshape(-1, *[1] * (x.ndim - axis - 1))
        return update_in_dim(x, jnp.where(own, new, before), self.begin, axis)


class _Keys(NamedTuple):
    """Keys and values of one visit, which query sees which, and where they begin in their run."""

    key: Float[Array, "S K H"]
    value: Float[Array, "S K Hv"]
    seen: Bool[Array, "Q S"]
    begin: Int[Array, ""] | int


def _joined(runs: tuple[KeyRun, ...]) -> tuple[KeyRun, ...]:
    """Runs that follow one another as one run."""
    if len(runs) == 1:
        return runs
    key = jnp.concatenate([run.key for run in runs], axis=1)
    value = jnp.concatenate([run.value for run in runs], axis=1)
    return (KeyRun(key, value, runs[0].offset),)


def _by_runs(
    runs: tuple[KeyRun, ...], dkeys: tuple[tuple[Array, Array], ...]
) -> tuple[tuple[Array, Array], ...]:
    """Gradients of `_joined` runs, run by run."""
    if len(runs) == len(dkeys):
        return dkeys
    ((dkey, dvalue),) = dkeys
    found = []
    for run in runs:
        begin = run.offset - runs[0].offset
        end = begin + run.key.shape[1]
        found.append((dkey[:, begin:end], dvalue[:, begin:end]))
    return tuple(found)


def _sinks_in(spec: Spec, offset: int, length: int) -> int:
    """Sinks to look for in a run: only the shard's own keys hold any."""
    return spec.num_sinks if offset + length > 0 else 0


# Weighted values, running maximum and running sum of the online softmax.
_Sum = tuple[Float[Array, "K G Q Hv"], Float[Array, "K G Q"], Float[Array, "K G Q"]]


def _each_row(one_row: Callable, bounds: tuple[Starts, tuple[Int[Array, "..."], ...]]) -> Callable:
    """Maps over the batch: at once where rows share their bounds, else one after the other."""
    if bounds[0].ndim:
        return lambda *args: lax.map(lambda row: one_row(*row), (bounds, *args))
    return lambda *args: jax.vmap(partial(one_row, bounds))(*args)


def _without_padding(
    runs: tuple[tuple[Array, Array], ...],
    offsets: tuple[int, ...],
    start: Int[Array, ""] | Int[Array, "T"],
) -> tuple[tuple[Array, ...], ...]:
    """Pairs of [S, heads, dim] at these offsets with zeros for padding."""
    if not start.ndim:
        return runs
    found = []
    for pair, offset in zip(runs, offsets, strict=True):
        real = _is_real_key(start, offset, pair[0].shape[0])
        found.append(tuple(jnp.where(real[:, None, None], x, 0) for x in pair))
    return tuple(found)


def _is_real_key(start: Int[Array, "T"], offset: int, length: int) -> Bool[Array, "S"]:
    """Whether a key of a run is a token, or before the shard one that a query may see."""
    positions = offset + jnp.arange(length, dtype=jnp.int32)
    before = min(-offset, length)
    # A query sees keys before its shard only if its sequence crosses into the shard.
    crossing = positions[:before] >= start[0]
    own = is_real(positions[before:], start[: length - before])
    return jnp.concatenate([crossing, own])


def _plans(
    spec: Spec, runs: tuple[KeyRun, ...], start: Starts, rows: tuple[int, int]
) -> tuple[Int[Array, "..."], ...]:
    return tuple(
        key_plan(
            start,
            spec.window,
            _sinks_in(spec, run.offset, run.key.shape[1]),
            rows=rows,
            query_tile=min(xla_tiles(spec.window).query, rows[1] - rows[0]),
            offset=run.offset,
            length=run.key.shape[1],
            key_tile=min(xla_tiles(spec.window).key, run.key.shape[1]),
        )
        for run in runs
    )


def _group(x: Float[Array, "T N H"], num_kv: int) -> Float[Array, "T K G H"]:
    return einops.rearrange(x, "t (k g) h -> t k g h", k=num_kv)


def _group_rows(x: Float[Array, "N T"], num_kv: int) -> Float[Array, "K G T"]:
    return einops.rearrange(x, "(k g) t -> k g t", k=num_kv)


def _num_query_tiles(spec: Spec, rows: tuple[int, int]) -> int:
    return -(-(rows[1] - rows[0]) // xla_tiles(spec.window).query)


def _query_tile(
    spec: Spec,
    t: Int[Array, ""] | int,
    rows: tuple[int, int],
    start: Int[Array, ""] | Int[Array, "T"],
) -> _QueryTile:
    size = min(xla_tiles(spec.window).query, rows[1] - rows[0])
    first = rows[0] + t * size
    begin = jnp.minimum(first, rows[1] - size)
    positions = begin + jnp.arange(size, dtype=jnp.int32)
    if start.ndim:
        start = slice_in_dim(start, begin, size)
    return _QueryTile(begin, positions, start, positions >= first)


def _over_keys(
    spec: Spec, tile: _QueryTile, run: KeyRun, plan: Int[Array, "6"], visit: Callable, carry
):
    """Folds ``visit`` over the key tiles of ``run`` that the query tile sees."""
    length = run.key.shape[0]
    size = min(xla_tiles(spec.window).key, length)
    sink_begin, sink_end, begin, _, _, end = plan
    skipped = begin - sink_end

    def body(index, carry):
        first_key = jnp.where(index < sink_end, index, index + skipped) * size
        slice_begin = jnp.minimum(first_key, length - size)
        local = slice_begin + jnp.arange(size, dtype=jnp.int32)
        rule = sees_behind_halo if run.offset else sees
        seen = rule(
            tile.positions[:, None],
            run.offset + local,
            tile.start[..., None],
            spec.window,
            _sinks_in(spec, run.offset, length),
            # A tile of joined runs may hold keys before the first sequence, which are nobody's.
            packed=tile.start.ndim > 0 or -length < run.offset < 0,
        )
        key, value = (slice_in_dim(x, slice_begin, size) for x in (run.key, run.value))
        seen = seen & tile.own[:, None] & (local >= first_key)
        return visit(_Keys(key, value, seen, slice_begin), carry)

    return lax.fori_loop(sink_begin, end - skipped, body, carry)


def _sink_keys(
    spec: Spec, tile: _QueryTile, sinks: SinkRun, start: Int[Array, ""] | Int[Array, "T"]
) -> _Keys:
    crossing = start[0] if start.ndim else start
    positions = crossing + jnp.arange(sinks.key.shape[0], dtype=jnp.int32)
    seen = sees_fetched_sink(
        tile.positions[:, None], positions, tile.start[..., None], spec.window, spec.num_sinks
    )
    if start.ndim:
        real = (positions < 0)[:, None, None]
        sinks = SinkRun(*(jnp.where(real, x, 0) for x in sinks))
    return _Keys(sinks.key, sinks.value, seen & tile.own[:, None], 0)


def _dot(
    spec: Spec, equation: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype
) -> Float[Array, "..."]:
    return jnp.einsum(equation, x, y, precision=spec.precision, preferred_element_type=dtype)


def _logits(
    spec: Spec, query: Float[Array, "Q K G H"], key: Float[Array, "S K H"], dtype
) -> tuple[Float[Array, "K G Q S"], Float[Array, "K G Q S"] | None]:
    """Scaled and capped logits, and the derivative of the cap (None without one)."""
    logits = _dot(spec, "qkgh,skh->kgqs", query, key, dtype) * spec.scale
    if spec.soft_cap is None:
        return logits, None
    bounded = jnp.tanh(logits / spec.soft_cap)
    return spec.soft_cap * bounded, 1 - bounded**2


def _initial_softmax(
    query: Float[Array, "Q K G H"], value_dim: int, sink_logits: Float[Array, "N"] | None, dtype
) -> _Sum:
    """The sums before any key."""
    rows, num_kv, groups, _ = query.shape
    acc = full_like_varying(query, (num_kv, groups, rows, value_dim), 0, dtype)
    if sink_logits is None:
        row_max = full_like_varying(query, acc.shape[:-1], -jnp.inf, dtype)
        return acc, row_max, jnp.zeros_like(row_max)
    row_max = jnp.broadcast_to(sink_logits.reshape(num_kv, groups, 1), acc.shape[:-1]).astype(dtype)
    return acc, row_max, jnp.ones_like(row_max)


def _softmax_step(spec: Spec, query: Float[Array, "Q K G H"], keys: _Keys, carry: _Sum) -> _Sum:
    """One step of the online softmax."""
    acc, row_max, row_sum = carry
    logits, _ = _logits(spec, query, keys.key, acc.dtype)
    logits = jnp.where(keys.seen, logits, -jnp.inf)
    new_max = jnp.maximum(row_max, logits.max(-1))
    finite_max = jnp.where(new_max == -jnp.inf, 0, new_max)
    rescale = jnp.exp(row_max - finite_max)
    weights = jnp.exp(logits - finite_max[..., None])
    values = _dot(spec, "kgqs,skv->kgqv", weights.astype(keys.value.dtype), keys.value, acc.dtype)
    return rescale[..., None] * acc + values, new_max, rescale * row_sum + weights.sum(-1)


def _gradients(
    spec: Spec,
    query: Float[Array, "Q K G H"],
    dout: Float[Array, "Q K G Hv"],
    lse: Float[Array, "K G Q"],
    delta: Float[Array, "K G Q"],
    keys: _Keys,
) -> tuple[Float[Array, "Q K G H"], Float[Array, "S K H"], Float[Array, "S K Hv"]]:
    """(dquery, dkey, dvalue) of one pair of tiles."""
    dtype = lse.dtype
    logits, dcap = _logits(spec, query, keys.key, dtype)
    finite_lse = jnp.where(lse == -jnp.inf, 0, lse)[..., None]
    weights = jnp.exp(jnp.where(keys.seen, logits - finite_lse, -jnp.inf))
    dweights = _dot(spec, "qkgv,skv->kgqs", dout, keys.value, dtype)
    dlogits = weights * (dweights - delta[..., None]) * spec.scale
    dlogits = (dlogits if dcap is None else dlogits * dcap).astype(keys.key.dtype)
    weights = weights.astype(keys.value.dtype)
    return (
        _dot(spec, "kgqs,skh->qkgh", dlogits, keys.key, dtype),
        _dot(spec, "kgqs,qkgh->skh", dlogits, query, dtype),
        _dot(spec, "kgqs,qkgv->skv", weights, dout, dtype),
    )


def _add_rows(
    total: Float[Array, "S K H"], part: Float[Array, "s K H"], begin: Int[Array, ""] | int
) -> Float[Array, "S K H"]:
    rows = slice_in_dim(total, begin, part.shape[0]) + part
    return update_in_dim(total, rows, begin, 0)
