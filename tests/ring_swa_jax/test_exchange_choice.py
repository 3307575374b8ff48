"""Which exchange a call takes, and what a wrong one is answered by, at trace time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import ring_swa_jax as rsj
from ring_swa_jax import _exchange
from ring_swa_jax._axis import SequenceAxis
from ring_swa_jax._window import Window
from tests.helpers.errors import complains


def choose(exchange=None, *, devices=4, chunk=8, heads=4, window=None, sinks=0):
    return _exchange.choose_exchange(
        exchange,
        SequenceAxis("seq", devices),
        chunk=chunk,
        heads=heads,
        window=Window.of(window),
        num_sinks=sinks,
    )


def call(exchange, *, devices=4, window=None, heads=4, length=32, **options):
    mesh = AbstractMesh((devices,), ("seq",), (AxisType.Auto,))
    x = jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32)
    attend = functools.partial(
        rsj.ring_attention, window_size=window, mesh=mesh, exchange=exchange, **options
    )
    return jax.eval_shape(attend, x, x, x)


@pytest.mark.parametrize(
    ("expected", "settings"),
    [
        ("halo", dict(window=7)),
        ("all_to_all", dict(window=8)),  # a chunk and more
        ("halo", dict(window=30, heads=3)),
        ("all_to_all", dict(window=31)),  # as long as the sequence: no window
        ("halo", dict(window=(7, 5))),
        ("all_to_all", dict(window=(2, 8))),
        ("all_to_all", dict(window=(3, None))),
        ("ring", dict(window=(None, None), heads=6)),
        ("all_to_all", dict(heads=8)),
        ("ring", dict(heads=6)),  # 4 devices do not divide 6 heads
        ("ring", dict(devices=16, heads=40)),
        ("halo", dict(devices=1)),  # nothing to fetch
    ],
    ids=repr,
)
def test_none_takes(expected, settings):
    assert choose(**settings) == expected


@pytest.mark.parametrize(
    ("expected", "settings"),
    [
        ("halo", dict(window=11585)),  # 11585^2 = 2048 * 65536 - 5503
        ("all_to_all", dict(window=11586)),
        ("halo", dict(window=11586, heads=6)),
        ("halo", dict(window=(8192, 8192))),  # 2 * 8192^2 = 2048 * 65536
        ("all_to_all", dict(window=(8192, 8193))),
        ("all_to_all", dict(window=(0, 11586))),
        ("halo", dict(window=16383, chunk=32768)),  # the same window of a longer sequence
        ("all_to_all", dict(window=16385, chunk=32768)),
        ("halo", dict(devices=8, chunk=8192, window=8191)),
        ("halo", dict(devices=2, chunk=32768, window=11585)),
        ("all_to_all", dict(devices=2, chunk=32768, window=11586)),
        # Each of two devices lacks as many keys: sharing them out saves nothing.
        ("halo", dict(devices=2, chunk=32768, window=(16383, 16383))),
        ("all_to_all", dict(devices=2, chunk=32768, window=(16383, 8000))),
        ("all_to_all", dict(devices=2, chunk=32768, window=(8000, 16383))),
    ],
    ids=repr,
)
def test_none_weighs_a_window_below_a_chunk(expected, settings):
    assert choose(**(dict(chunk=16384, heads=32) | settings)) == expected


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("window", [(24, 0), (0, 24), (24, 24), (20, 7), (7, 20)], ids=repr)
def test_none_counts_the_keys_that_the_busiest_device_has_above_the_mean(
    devices, window, monkeypatch
):
    """The formula, against a count of every query's keys."""
    chunk, (left, right) = 32, window
    i = np.arange(devices * chunk)
    keys = np.minimum(i, left) + 1 + np.minimum(i[::-1], right)
    saved = float(keys.reshape(devices, chunk).mean(1).max() - keys.mean())
    rounding = (left + right) / (2 * i.size)  # L queries lack (L + 1) / 2 keys each in the mean
    for cost, expected in ((saved, "halo"), (saved - 1.01 * rounding, "all_to_all")):
        monkeypatch.setattr(_exchange, "COST_OF_HEADS", cost)
        assert choose(devices=devices, chunk=chunk, heads=devices, window=window) == expected


@pytest.mark.parametrize(
    ("per_process", "expected"), [(8, "all_to_all"), (4, "all_to_all"), (2, "ring")]
)
def test_heads_are_exchanged_inside_a_host_only(per_process, expected, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: per_process)
    mesh = AbstractMesh((2, 4), ("data", "seq"), (AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        assert choose() == expected
        assert _exchange.within_one_host(("data", "seq")) == (per_process == 8)


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        (("exchange='rings'", "halo"), dict(exchange="rings")),
        (("window_size=None", "all_to_all"), dict(exchange="halo")),
        (("window_size=7", "32"), dict(exchange="ring", window=7)),
        (("6 query heads", "4 devices"), dict(exchange="all_to_all", heads=6)),
        (("layout='zigzag'", "dual_chunk"), dict(exchange=None, layout="zigzag")),
        (("dual_chunk", "36", "2 x 4"), dict(exchange=None, layout="dual_chunk", length=36)),
        (("num_sink_tokens=9",), dict(exchange="halo", window=3, num_sink_tokens=9)),
    ],
    ids=repr,
)
def test_errors_show_the_values_and_the_mend(values, settings):
    with complains(ValueError, *values):
        call(**settings)


def test_a_wrong_name_is_found_on_one_device_too():
    x = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
    attend = functools.partial(rsj.ring_sliding_window_attn, window_size=3)
    for wrong in ("rings", ""):
        with complains(ValueError, f"exchange={wrong!r}"):
            jax.eval_shape(functools.partial(attend, exchange=wrong), x, x, x)
    for exchange in (*_exchange.EXCHANGES, None):
        jax.eval_shape(functools.partial(attend, exchange=exchange), x, x, x)


def test_more_sinks_than_a_chunk_where_heads_are_exchanged():
    call("all_to_all", window=3, num_sink_tokens=9)
    call(None, window=None, num_sink_tokens=9)


def lines_of_program(exchange, devices, length):
    """Of forward and backward, lowered for a mesh of devices that are not here."""
    mesh = AbstractMesh((devices,), ("seq",), (AxisType.Auto,))
    query, key = (jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2 * devices, 1))
    attend = functools.partial(rsj.ring_attention, window_size=None, mesh=mesh, exchange=exchange)

    def both(q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    lowered = jax.jit(both).trace(query, key, key, query).lower(lowering_platforms=("cpu",))
    return len(lowered.as_text().splitlines())


@pytest.mark.parametrize("exchange", ["all_to_all", "ring"])
def test_the_program_does_not_grow_with_the_devices(exchange):
    """On 4 and 64, with kernels of the same shapes: a whole sequence's, or a chunk's in a ring."""
    lengths = {n: 512 if exchange == "all_to_all" else 8 * n for n in (4, 64)}
    assert len({lines_of_program(exchange, n, length) for n, length in lengths.items()}) == 1
