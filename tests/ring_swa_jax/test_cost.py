"""Memory and time grow with S * W, never with S * S: read from compiled programs, and one clock."""

import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ring_swa_jax as rsj
from tests.helpers.hlo import largest_buffer
from tests.helpers.routes import make_mesh, with_gradients

WINDOW = 127


def shapes(length, sharding=None):
    """q, k, v, sink_logits, segment_ids and dout as shapes: 2 query heads, 1 key head, H = 16."""

    def array(*shape, dtype=jnp.float32, sharding=sharding):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, k = array(1, length, 2, 16), array(1, length, 1, 16)
    return q, k, k, array(2, sharding=None), array(1, length, dtype=jnp.int32), q


def compiled(length, implementation, mesh=None, *, gradients=True, **options):
    """Forward (and backward) of ring_attention, on one device or over `mesh`."""
    options |= dict(mesh=mesh) if mesh else dict(seq_axis=None)

    def attend(q, k, v, sink, ids):
        ids = ids if options.get("num_sink_tokens") else None
        return rsj.ring_attention(
            q, k, v, sink_logits=sink, segment_ids=ids, implementation=implementation, **options
        )

    sharding = NamedSharding(mesh, P(None, "seq")) if mesh else None
    if not gradients:
        return jax.jit(attend).lower(*shapes(length, sharding)[:5]).compile()
    return jax.jit(with_gradients(attend)).lower(*shapes(length, sharding)).compile()


def temporary(program):
    """Bytes that the program allocates besides arguments and results, per device."""
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("sinks", [0, 4], ids=["plain", "sinks_and_segments"])
def test_memory_is_linear_in_length_at_fixed_window(sinks, implementation):
    options = dict(window_size=WINDOW, num_sink_tokens=sinks)
    short, long = (compiled(s, implementation, **options) for s in (4096, 8192))
    assert temporary(short) > 0
    assert temporary(long) <= 2.2 * temporary(short)
    assert temporary(long) < 8192 * 8192 / 4  # far less than one byte per pair
    assert largest_buffer(long.as_text()) < 8192 * 4 * WINDOW


def test_full_causal_has_no_square_buffer(implementation):
    short, long = (compiled(s, implementation, window_size=None) for s in (2048, 4096))
    assert temporary(long) <= 2.2 * temporary(short)
    assert largest_buffer(long.as_text()) < 4096 * 4096 / 4


@pytest.mark.slow
@pytest.mark.parametrize("window", [WINDOW, 700])
def test_memory_of_a_device_depends_on_its_chunk_only(window, implementation):
    options = dict(window_size=window, exchange="halo")
    few = compiled(512 * 4, implementation, make_mesh(seq=4), **options)
    many = compiled(512 * 8, implementation, make_mesh(seq=8), **options)
    assert temporary(many) <= 1.1 * temporary(few)
    assert largest_buffer(many.as_text()) < 512 * 8 * 512 / 4


@pytest.mark.slow
def test_many_hops_keep_few_halos_alive(implementation):
    """Nearly all keys: twice the devices, four more hops, not four more halos on each device."""
    halo = 512 * 4 * (16 + 16)  # bytes of the keys and values of a chunk

    def growth(**options):
        few, many = (
            compiled(
                512 * n,
                implementation,
                make_mesh(seq=n),
                window_size=512 * n - 2,
                exchange="halo",
                **options,
            )
            for n in (4, 8)
        )
        return temporary(many) - temporary(few)

    assert growth(gradients=False) < halo / 4
    # Four halos fetched again and four of gradients, if all were kept. XLA's CPU scheduler still
    # puts off some of the sums in which gradients end.
    assert growth() < 4 * halo


def test_time_is_linear_in_length_at_fixed_window(implementation):
    def seconds(length):
        program = compiled(length, implementation, window_size=WINDOW)
        inputs = [jnp.ones(x.shape, x.dtype) for x in shapes(length)]
        best = float("inf")
        for _ in range(4):
            begin = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            best = min(best, time.perf_counter() - begin)
        return best

    assert seconds(32768) < 10 * seconds(8192)  # linear: 4, quadratic: 16
