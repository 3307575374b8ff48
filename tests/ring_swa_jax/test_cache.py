"""The decoding cache: prompt, then tokens one by one or in chunks, against the whole sequence.

Rows of a batch have sequences of different lengths: row b decodes what follows its own prompt.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from ring_swa_jax import _cache_append
from ring_swa_jax._cache import Cache, next_positions
from ring_swa_jax._cache_new import init_cache, prefill_cache
from ring_swa_jax._decode import decode_attention
from tests.helpers import oracle
from tests.helpers.cases import Case
from tests.helpers.errors import complains
from tests.helpers.hlo import collectives
from tests.helpers.routes import TOLERANCE, make_mesh

LENGTH = 26
PROMPTS = (3, 0, 17)  # shorter than most windows, none, longer
BASE = Case(LENGTH, 1, 5, 2, batch=3, heads=(4, 2), dims=(16, 8))


STATIC = ("window_size", "num_sink_tokens", "max_length", "relative_positions")
# Compiling is most of the time.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
fill = quick(prefill_cache, static_argnames=STATIC)
attend = quick(
    decode_attention, static_argnames=(*STATIC[:2], "scale", "logits_soft_cap", "rotate")
)
rope = quick(rsj.apply_rope)


def settings(case):
    return dict(window_size=case.window, num_sink_tokens=case.sinks)


def attend_options(case, sink=None, rotate=None):
    options = dict(scale=case.scale, logits_soft_cap=case.softcap, rotate=rotate)
    return settings(case) | options | dict(sink_logits=sink)


def ids_of(lengths, width, side="right"):
    """Segment ids of one sequence a row, padded on one side."""
    token = np.arange(width) < np.array(lengths)[:, None]
    return np.where(token if side == "right" else token[:, ::-1], 0, -1)


def prompt(x, lengths, width, side="right"):
    """The first lengths[b] tokens of each row, and NaN where there is none."""
    x = np.asarray(x)
    out = np.full((x.shape[0], width, *x.shape[2:]), np.nan, x.dtype)
    for row, n in enumerate(lengths):
        out[row, slice(0, n) if side == "right" else slice(width - n, width)] = x[row, :n]
    return out


def prefilled(case, lengths=PROMPTS, side="right", width=LENGTH, **options):
    (_, k, v, _), _ = case.arrays()
    k, v = (prompt(x, lengths, width, side) for x in (k, v))
    ids = ids_of(lengths, width, side)
    return fill(k, v, segment_ids=ids, **settings(case), **options)


def follow(x, at, count):
    """[B, count, ...]: what follows position at[b] in each row."""
    return np.stack([np.asarray(x)[b, n : n + count] for b, n in enumerate(at)])


@functools.partial(
    quick, static_argnames=("chunk", *STATIC[:2], "scale", "logits_soft_cap", "rotate")
)
def scan(cache, tokens, chunk, **options):
    """Attention of all the tokens, `chunk` at a time."""

    def step(cache, tokens):
        out, cache = decode_attention(*tokens, cache, **options)
        return cache, out

    def cut(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    cache, out = jax.lax.scan(step, cache, tuple(map(cut, tokens)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:]), cache


def decode(case, cache, at=PROMPTS, chunk=1, count=None, rotate=None):
    """(results [B, count, N, Hv], cache) of `count` tokens a row, `chunk` at a time, by scan."""
    (q, k, v, sink), _ = case.arrays()
    count = LENGTH - max(at) if count is None else count
    tokens = [follow(x, at, count) for x in (q, k, v)]
    return scan(cache, tokens, chunk, **attend_options(case, sink, rotate))


def assert_close(got, want, dtype="float32"):
    assert got.dtype == dtype
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    relative, absolute = TOLERANCE[dtype]
    error = np.linalg.norm(got - want)
    assert error <= relative * np.linalg.norm(want) + absolute * math.sqrt(want.size)


def assert_same_cache(a, b):
    """Same tokens in the same slots, and the same settings."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# (window, sinks, tokens a step); a step of 9 is longer than most buffers
STEPS = [(0, 4, 9), (5, 7, 3), (30, 1, 1)]
MORE_STEPS = [
    (window, sinks, chunk) for window in (0, 1, 5, 30) for sinks in (0, 1, 4, 7, 12)
    for chunk in (1, 3, 9) if (window, sinks, chunk) not in STEPS
]  # fmt: skip


def check_steps(window, sinks, chunk):
    case = dataclasses.replace(BASE, window=window, sinks=sinks)
    out, cache = decode(case, prefilled(case), chunk=chunk)
    assert_close(out, follow(case.expected.out, PROMPTS, 9))
    assert_same_cache(cache, prefilled(case, [n + 9 for n in PROMPTS]))


@pytest.mark.parametrize(("window", "sinks", "chunk"), STEPS)
def test_steps_equal_whole_sequence(window, sinks, chunk):
    check_steps(window, sinks, chunk)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "sinks", "chunk"), MORE_STEPS)
def test_more_steps_equal_whole_sequence(window, sinks, chunk):
    check_steps(window, sinks, chunk)


@pytest.mark.parametrize(
    ("heads", "scale", "chunk"),
    [pytest.param((3, 3), None, 1, marks=pytest.mark.slow), ((6, 1), 0.3, 9)],
)
def test_heads_learned_sinks_and_soft_cap(heads, scale, chunk):
    case = dataclasses.replace(
        BASE, heads=heads, dims=(8, 24), learned=True, softcap=1.5, scale=scale
    )
    out, _ = decode(case, prefilled(case), chunk=chunk)
    assert_close(out, follow(case.expected.out, PROMPTS, 9))


@pytest.mark.parametrize(
    ("dtype", "chunk"), [("bfloat16", 1), pytest.param("float16", 9, marks=pytest.mark.slow)]
)
def test_low_precision(dtype, chunk):
    case = dataclasses.replace(BASE, dtype=dtype, learned=True)
    out, cache = decode(case, prefilled(case), chunk=chunk)
    assert cache.key.dtype == cache.sink_value.dtype == dtype
    assert_close(out, follow(case.expected.out, PROMPTS, 9), dtype)


def test_float64_is_kept():
    with jax.enable_x64(True):
        case = dataclasses.replace(BASE, dtype="float64")
        (q, k, v, _), _ = case.arrays()
        cache = init_cache(3, 2, 16, value_dim=8, dtype=q.dtype, **settings(case))
        out, cache = attend(q, k, v, cache, **attend_options(case))
        assert out.dtype == cache.key.dtype == jnp.float64
        assert cache.length.dtype == jnp.int32
        want = oracle.attention(q, k, v, np.zeros(out.shape), case.mask()).out
        np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-12)


def test_equals_ring_attention_with_rotated_keys():
    case = dataclasses.replace(BASE, dims=(16, 16))
    (q, k, v, _), _ = case.arrays()
    everywhere = jnp.broadcast_to(jnp.arange(LENGTH), (3, LENGTH))
    turned = [rope(x, everywhere) for x in (q, k)]
    whole = rsj.ring_attention(*turned, v, seq_axis=None, **settings(case))
    prompts = [prompt(x, PROMPTS, 17) for x in (turned[1], v)]
    cache = fill(*prompts, segment_ids=ids_of(PROMPTS, 17), **settings(case))
    for step in range(9):
        at = [n + step for n in PROMPTS]
        positions = next_positions(cache, 1)
        assert positions[:, 0].tolist() == at
        new = [rope(follow(x, at, 1), positions) for x in (q, k)]
        out, cache = attend(*new, follow(v, at, 1), cache, **settings(case))
        assert_close(out, follow(whole, at, 1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("window", "sinks"), [(0, 4), (5, 2), (30, 1)])
@pytest.mark.parametrize("lengths", [(0, 1, 2), (5, 6, 7), (11, 12, 26)])
def test_prompt_fills_the_slots(lengths, window, sinks, side):
    case = dataclasses.replace(BASE, window=window, sinks=sinks)
    cache = prefilled(case, lengths, side)
    assert cache.length.tolist() == list(lengths)
    k, v = map(np.asarray, case.arrays()[0][1:3])
    key, value, sink_key, sink_value, *_ = map(np.asarray, jax.tree.leaves(cache))
    slots = min(window + 1, LENGTH)
    for row, n in enumerate(lengths):
        for p in range(max(0, n - slots), n):
            np.testing.assert_array_equal(key[row, :, p % (window + 1)], k[row, p])
            np.testing.assert_array_equal(value[row, :, p % (window + 1)], v[row, p])
        for p in range(min(sinks, n)):
            np.testing.assert_array_equal(sink_key[row, :, p], k[row, p])
            np.testing.assert_array_equal(sink_value[row, :, p], v[row, p])
    assert not any(np.isnan(x).any() for x in (key, value, sink_key, sink_value))


def test_prompt_of_packed_sequences_leaves_the_last_one():
    case = dataclasses.replace(BASE, window=5, sinks=2)
    k, v = map(np.asarray, case.arrays()[0][1:3])
    ids = np.zeros((3, 20), np.int32)
    ids[0, 12:] = 1  # the last one begins at 12
    ids[1, 7:9], ids[1, 17:] = -1, -2  # it begins after padding, and padding follows
    ids[2] = -1
    cache = fill(k[:, :20], v[:, :20], segment_ids=ids, **settings(case))
    assert cache.length.tolist() == [8, 8, 0]
    alone = [np.stack([x[0, 12:20], x[1, 9:17], x[2, :8]]) for x in (k, v)]
    alone = [prompt(x, [8, 8, 0], 20) for x in alone]
    assert_same_cache(cache, fill(*alone, segment_ids=ids_of([8, 8, 0], 20), **settings(case)))


def test_prompt_without_segment_ids_is_all_tokens():
    (_, k, v, _), _ = BASE.arrays()
    cache = fill(k, v, **settings(BASE))
    assert_same_cache(cache, prefilled(BASE, [LENGTH] * 3))


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_padding_among_new_tokens(chunk):
    """Rows that get fewer tokens, or none; the padding holds NaN."""
    case = dataclasses.replace(BASE, learned=True)
    (q, k, v, sink), _ = case.arrays()
    rng = np.random.default_rng(0)
    cache, at = prefilled(case), np.array(PROMPTS)
    for _ in range(8 // chunk):
        valid = rng.random((3, chunk)) < 0.6
        index = np.minimum(at[:, None] + valid.cumsum(1) - 1, LENGTH - 1)
        tokens = [
            np.where(
                valid[..., None, None], np.take_along_axis(x, index[..., None, None], 1), np.nan
            )
            for x in map(np.asarray, (q, k, v))
        ]
        positions = next_positions(cache, chunk, jnp.asarray(valid))
        np.testing.assert_array_equal(positions, np.where(valid, index, 0))
        out, cache = attend(*tokens, cache, valid=valid, **attend_options(case, sink))
        want = np.take_along_axis(case.expected.out, index[..., None, None], 1)
        assert_close(out, np.where(valid[..., None, None], want, 0))
        assert (np.asarray(out)[~valid] == 0).all()
        at = at + valid.sum(1)
    assert not valid.all() and (at < LENGTH).all()
    assert_same_cache(cache, prefilled(case, at.tolist()))


def test_no_slot_is_written_twice_in_a_step(monkeypatch):
    """A scatter with duplicates is undefined, though a CPU lets the last one win."""
    written = []
    monkeypatch.setattr(
        _cache_append, "_scatter", lambda buffer, slots, tokens: written.append(slots) or buffer
    )
    cache = init_cache(3, 2, 16, **settings(BASE))
    valid = jnp.asarray(np.random.default_rng(0).random((3, 20)) < 0.8)
    k = jnp.ones((3, 20, 2, 16))
    sinks_stored = _cache_append.append_sinks(cache, k, k, valid)
    _cache_append.append_window(sinks_stored, k, k, valid)
    assert len(written) == 4
    for slots, held in zip(written, (2, 2, 6, 6), strict=True):
        assert all(len(set(row)) == 20 for row in slots.tolist())
        assert (slots < held).sum(1).tolist() == [held] * 3


def test_endless_stream_in_constant_memory():
    case = Case(70, 1, 5, 2, batch=2, heads=(2, 1), learned=True)
    cache = init_cache(2, 1, 16, **settings(case))
    (q, k, v, sink), _ = case.arrays()
    options = attend_options(case, sink)
    out, after = decode(case, cache, at=(0, 0), count=70)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)
    assert jax.tree.map(jnp.size, after).key == 2 * 6 * 16
    assert after.length.tolist() == [70, 70]
    assert_close(out, case.expected.out)

    def temporary(steps):
        def stream(cache, q, k, v):
            def step(cache, _):
                out, cache = decode_attention(q, k, v, cache, **options)
                return cache, out.sum()

            return jax.lax.scan(step, cache, length=steps)

        arrays = (x[:, :1] for x in (q, k, v))
        program = jax.jit(stream).lower(cache, *arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert 0 < temporary(4000) <= temporary(1000) + 4 * 4000


def test_a_step_writes_a_donated_cache_in_place():
    cache = init_cache(2, 2, 64, window_size=1023, num_sink_tokens=4)
    x = jnp.zeros((2, 1, 2, 64))
    step = jax.jit(
        functools.partial(decode_attention, window_size=1023, num_sink_tokens=4), donate_argnums=3
    )
    memory = step.lower(x, x, x, cache).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 8


def test_capacity_without_window():
    case = dataclasses.replace(BASE, window=None, sinks=2)
    cache = prefilled(case, max_length=21, width=21)
    assert cache.max_length == 21 and cache.sink_key.size == 0
    out, _ = decode(case, cache, chunk=3)
    want = follow(case.expected.out, PROMPTS, 9)
    got = np.asarray(out)
    assert np.isnan(got[2, 4:]).all()  # positions 21 and on of the longest row
    assert_close(out[:2], want[:2])
    assert_close(out[2, :4], want[2, :4])


def test_max_length_below_the_window_saves_slots():
    case = dataclasses.replace(BASE, window=23, sinks=2)
    cache = prefilled(case, max_length=20, width=20)
    assert cache.key.shape == (3, 2, 20, 16) and cache.max_length == 20
    out, _ = decode(case, cache)
    assert_close(out[:, :3], follow(case.expected.out, PROMPTS, 3))
    assert np.isnan(out[2, 3:]).all() and not np.isnan(out[:2]).any()


def test_max_length_above_the_window_changes_nothing():
    case = dataclasses.replace(BASE, window=5)
    cache = prefilled(case, max_length=6)
    assert cache.max_length is None
    assert_same_cache(cache, prefilled(case))


def test_the_count_never_wraps_around():
    last = 2**31 - 1
    cache = dataclasses.replace(
        prefilled(BASE), length=jnp.array([last - 2, last - 1, last], jnp.int32)
    )
    x = jnp.ones((3, 1, 4, 16)), jnp.ones((3, 1, 2, 16)), jnp.ones((3, 1, 2, 8))
    out, cache = attend(*x, cache, **settings(BASE))
    assert np.isnan(out).any((1, 2, 3)).tolist() == [False, False, True]
    assert cache.length.tolist() == [last - 1, last, last]
    out, cache = attend(*x, cache, **settings(BASE))
    assert np.isnan(out).any((1, 2, 3)).tolist() == [False, True, True]
    assert cache.length.tolist() == [last, last, last]


def turn(x, position):
    """Rotary embedding in float64 of [..., H] at one position: halves paired, base 10000."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    rotated = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate(rotated, axis=-1)


def streaming_llm(q, k, v, sink, window, num_sinks):
    """One row of StreamingLLM, a list for the cache, keys turned by their index in the list."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    held, outs = [], []
    for t in range(len(q)):
        held.append((k[t], v[t]))
        sinks, rest = held[:num_sinks], held[num_sinks:]
        # The window may reach into the sinks; then nothing lies between them.
        held = sinks + rest[max(0, len(rest) - window - 1) :]
        first_in_window = max(0, t - window)
        visible = [
            i for i in range(len(held))
            if i < num_sinks or t - (len(held) - 1 - i) >= first_in_window
        ]  # fmt: skip
        held = [held[i] for i in visible]
        index = len(held) - 1
        assert index <= num_sinks + window
        out = []
        for head in range(q.shape[1]):
            query = turn(q[t, head], index)
            logits = [query @ turn(key[head // group], i) for i, (key, _) in enumerate(held)]
            weights = np.exp(np.array(logits) * q.shape[-1] ** -0.5)
            total = weights.sum() + (0 if sink is None else np.exp(float(sink[head])))
            pairs = list(zip(weights, held, strict=True))
            out.append(sum(w * x[head // group] for w, (_, x) in pairs) / total)
        outs.append(out)
    return np.array(outs)


@pytest.mark.parametrize(
    ("window", "sinks", "chunk"),
    [
        (5, 2, 1),
        (3, 6, 2),
        pytest.param(0, 1, 1, marks=pytest.mark.slow),
        pytest.param(5, 2, 13, marks=pytest.mark.slow),
        pytest.param(30, 4, 1, marks=pytest.mark.slow),
    ],
)
def test_cache_relative_positions(window, sinks, chunk):
    case = dataclasses.replace(BASE, window=window, sinks=sinks, learned=True)
    (q, k, v, sink), _ = case.arrays()
    options = dict(value_dim=8, relative_positions=True)
    cache = init_cache(3, 2, 16, **settings(case), **options)
    out, cache = decode(case, cache, (0, 0, 0), chunk, LENGTH, rsj.apply_rope)
    want = np.stack([streaming_llm(q[b], k[b], v[b], sink, window, sinks) for b in range(3)])
    assert_close(out, want)
    assert cache.length.tolist() == [LENGTH] * 3


def test_cache_relative_positions_are_bounded_and_prompts_differ_in_length():
    seen = []

    def rotate(x, positions):
        assert positions.shape == x.shape[:2] and positions.dtype == jnp.int32
        jax.debug.callback(lambda low, high: seen.append((low, high)), positions.min(),
                           positions.max())  # fmt: skip
        return rsj.apply_rope(x, positions)

    case = dataclasses.replace(BASE, window=4, sinks=3)
    (q, k, v, _), _ = case.arrays()
    cache = prefilled(case, relative_positions=True)
    out, _ = decode(case, cache, rotate=rotate)
    want = np.stack([streaming_llm(q[b], k[b], v[b], None, 4, 3) for b in range(3)])
    assert_close(out, follow(want, PROMPTS, 9))
    jax.effects_barrier()
    assert min(low for low, _ in seen) == 0 and max(high for _, high in seen) == 7


def test_relative_positions_without_window_are_absolute():
    case = dataclasses.replace(BASE, window=None)
    (q, k, v, _), _ = case.arrays()
    cache = init_cache(
        3, 2, 16, value_dim=8, max_length=LENGTH, relative_positions=True, **settings(case)
    )
    out, _ = decode(case, cache, (0, 0, 0), 13, LENGTH, rsj.apply_rope)
    q, k = (rope(x, jnp.arange(LENGTH)) for x in (q, k))
    assert_close(out, jax.jit(rsj.reference_attention)(q, k, v))


@pytest.mark.parametrize("chunk", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_relative_stream_outlives_the_count(chunk):
    """Far on, the count falls back by a multiple of the slots, and nothing else changes."""
    case = dataclasses.replace(BASE, window=4, sinks=3)
    near = prefilled(case, (15, 16, 17), relative_positions=True)
    slots = 5
    lap = (2**30 // slots - 4) * slots  # all rows pass 2**30 on their way
    far = dataclasses.replace(near, length=near.length + lap)
    (out, after), (out_far, after_far) = (
        decode(case, cache, (15, 16, 17), chunk, 9, rsj.apply_rope) for cache in (near, far)
    )
    assert (after_far.length < 100).all() and (after_far.length >= 8).all()
    np.testing.assert_array_equal(out, out_far)
    assert_same_cache(after, dataclasses.replace(after_far, length=after.length))
    np.testing.assert_array_equal(after.length % slots, after_far.length % slots)


@pytest.mark.parametrize(
    ("chunk", "rotate", "kind"),
    [
        (2, rsj.apply_rope, AxisType.Explicit),
        pytest.param(1, None, AxisType.Auto, marks=pytest.mark.slow),
    ],
)
def test_batch_and_heads_sharded(chunk, rotate, kind):
    mesh = make_mesh(kind, data=2, model=2)
    case = Case(LENGTH, 1, 5, 2, batch=2, heads=(4, 2), learned=True)
    (q, k, v, sink), _ = case.arrays()
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    at = (3, 17)
    cache = prefilled(case, at, relative_positions=rotate is not None)
    options = attend_options(case, sink, rotate)
    tokens = [follow(x, at, chunk) for x in (q, k, v)]
    want, after = attend(*tokens, cache, **options)
    spread = dataclasses.replace(
        jax.tree.map(lambda x: put(x, *("data", "model")[: x.ndim]), cache),
        length=put(cache.length, "data"),
    )
    tokens = [put(x, "data", None, "model") for x in tokens]
    step = jax.jit(functools.partial(decode_attention, **options | dict(sink_logits=None)))
    sink = put(sink, "model")
    with jax.set_mesh(mesh):
        program = step.lower(*tokens, spread, sink_logits=sink).compile()
    assert collectives(program.as_text()) == []
    out, spread = program(*tokens, spread, sink_logits=sink)
    assert out.sharding.is_equivalent_to(tokens[0].sharding, 4)
    assert spread.key.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 4)
    assert_close(out, want)
    assert_same_cache(spread, after)


def test_a_prompt_cut_over_devices_is_not_gathered():
    mesh = make_mesh(seq=4)
    sharding = NamedSharding(mesh, P(None, "seq"))
    k = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32, sharding=sharding)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32, sharding=sharding)
    program = fill.lower(k, k, segment_ids=ids, window_size=31, num_sink_tokens=4).compile()
    moved = collectives(program.as_text())
    assert moved and sum(c.bytes for c in moved) < 4096 * 2 * 16 * 4 / 4


@pytest.mark.parametrize("chunk", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_vmap(chunk):
    case = BASE
    (q, k, v, _), _ = case.arrays()
    cache = prefilled(case)
    tokens = [follow(x, PROMPTS, chunk) for x in (q, k, v)]
    step = functools.partial(decode_attention, **settings(case))
    row_by_row = jax.tree.map(lambda x: x[:, None], (*tokens, cache))
    out, mapped = quick(jax.vmap(step))(*row_by_row)
    assert_close(out[:, 0], follow(case.expected.out, PROMPTS, chunk))
    want = prefilled(case, [n + chunk for n in PROMPTS])
    assert_same_cache(jax.tree.map(lambda x: x[:, 0], mapped), want)


def new_tokens(count=1, batch=2, heads=(4, 2), dims=(16, 16), dtype=jnp.float32):
    (n, kv), (h, hv) = heads, dims
    shapes = (n, h), (kv, h), (kv, hv)
    return [jnp.ones((batch, count, *shape), dtype) for shape in shapes]


@pytest.mark.usefixtures("unchecked_signatures")
def test_errors_of_decode_attention():
    cache = init_cache(2, 2, 16, window_size=3, num_sink_tokens=1)
    relative = init_cache(2, 2, 16, window_size=3, num_sink_tokens=1, relative_positions=True)
    fixed = init_cache(2, 2, 16, window_size=None, max_length=5)
    options = dict(window_size=3, num_sink_tokens=1)

    def call(tokens=None, cache=cache, **changes):
        decode_attention(*(tokens or new_tokens()), cache, **options | changes)

    with complains(ValueError, "window_size=4", 3):
        call(window_size=4)
    with complains(ValueError, "num_sink_tokens=2", 1):
        call(num_sink_tokens=2)
    with complains(ValueError, "window_size=3", None):
        call(cache=fixed)
    with complains(ValueError, 6, "max_length=5"):
        call(new_tokens(6), fixed, window_size=None)
    with complains(ValueError, "(3, 1, 2, 16)", "(2, 2, 4, 16)"):
        call(new_tokens(batch=3))
    with complains(ValueError, "(2, 1, 4, 16)", "(2, 2, 4, 16)"):
        call(new_tokens(heads=(4, 4)))
    with complains(ValueError, "v (2, 1, 2, 8)", "(2, 2, 4, 16)"):
        call(new_tokens(dims=(16, 8)))
    with complains(TypeError, "bfloat16", "float32"):
        call(new_tokens(dtype=jnp.bfloat16))
    with complains(TypeError, "tuple"):
        call(cache=(cache.key, cache.value))
    with complains(ValueError, "relative_positions=True", "next_positions"):
        call(rotate=rsj.apply_rope)
    with complains(ValueError, "relative_positions=True", "rotate"):
        call(cache=relative)
    with complains(TypeError, "valid", "int32"):
        call(valid=jnp.ones((2, 1), jnp.int32))
    with complains(ValueError, "(2, 1)", "(2, 2)"):
        call(valid=jnp.ones((2, 2), bool))
    with complains(ValueError, "(4,)", "(3,)"):
        call(sink_logits=jnp.ones(3))
    with complains(ValueError, "logits_soft_cap", -1):
        call(logits_soft_cap=-1)


@pytest.mark.usefixtures("unchecked_signatures")
@pytest.mark.parametrize("make", ["init", "prefill"])
def test_errors_of_making_a_cache(make):
    def call(**options):
        options = dict(window_size=3) | options
        if make == "init":
            return init_cache(2, 2, 16, **options)
        return prefill_cache(*new_tokens(8)[1:], **options)

    with complains(ValueError, "max_length", "window_size=None"):
        call(window_size=None)
    with complains(ValueError, "window_size", -1):
        call(window_size=-1)
    with complains(ValueError, "num_sink_tokens", -1):
        call(num_sink_tokens=-1)
    with complains(ValueError, "max_length", 0):
        call(max_length=0)
    with complains(TypeError, "max_length", 8.0):
        call(window_size=None, max_length=8.0)


@pytest.mark.usefixtures("unchecked_signatures")
def test_errors_of_init_cache():
    with complains(ValueError, "head_dim", 0):
        init_cache(2, 2, 0, window_size=3)
    with complains(TypeError, "batch_size", "2.5"):
        init_cache(2.5, 2, 16, window_size=3)
    with complains(TypeError, "int32"):
        init_cache(2, 2, 16, window_size=3, dtype=jnp.int32)


@pytest.mark.usefixtures("unchecked_signatures")
def test_errors_of_prefill_cache():
    q, k, v = new_tokens(8)
    with complains(ValueError, 8, "max_length=7"):
        prefill_cache(k, v, window_size=None, max_length=7)
    with complains(ValueError, "(2, 8)", "(2, 7)"):
        prefill_cache(k, v, window_size=3, segment_ids=jnp.zeros((2, 7), jnp.int32))
    with complains(ValueError, "(2, 8, 4, 16)", "(2, 8, 2, 16)"):
        prefill_cache(q, v, window_size=3)


def test_a_cache_is_immutable():
    cache = init_cache(1, 1, 4, window_size=3)
    assert isinstance(cache, Cache)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.length = 0
