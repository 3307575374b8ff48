"""Runs kernels written in Mosaic GPU on a CPU, one operation after the other.

JAX has an interpreter for such kernels, but not for what ours use: accumulators that live through
loops, inline instructions, and reductions in global memory. Here a warpgroup is a Python thread,
and memory is a NumPy array. Programs run in the order of their indices, so a program that waits for
a later one raises.

Copies and products take effect at once, so a missing wait for one of them does not show. What does
show: a barrier on which too few arrive, a wait that comes more than one phase late, and memory that
is read before it is written, which holds NaN.
"""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

AT_ONCE = (
    "wgmma_wait",
    "commit_smem",
    "commit_smem_to_gmem_group",
    "wait_smem_to_gmem",
    "set_max_registers",
)
"""Functions of ``plgpu`` that do nothing current."""
TIMEOUT = 30.0
"""Seconds after which a barrier counts as one on which too few arrive."""


class Memory:
    """A view of an array, as a kernel sees it."""

    def __init__(self, array):
        self.array = array

    @property
    def at(self):
        return self

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def __getitem__(self, index):
        raise NotImplementedError


class View(Memory):
    """What ``ref.at`` is: its items are views."""

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        return Ref(self.array[*_numpy_index(index), ...])


class Ref(Memory):
    """Its items are values."""

    @property
    def at(self):
        return View(self.array)

    @property
    def T(self):
        return Ref(self.array.T)

    def __getitem__(self, index):
        return jnp.asarray(np.array(self.array[_numpy_index(index)]))

    def __setitem__(self, index, value):
        self.array[_numpy_index(index)] = np.asarray(value)


class Barrier:
    """Some barriers, or one of them."""

    def __init__(self, arrivals, number):
        self.needed, self.changed = arrivals, threading.Condition()
        self.arrived, self.phases = [0] * number, [0] * number
        self.waited = [{} for _ in range(number)]

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        return OneBarrier(self, int(index))


class OneBarrier:
    """The one of some barriers that has this number."""

    def __init__(self, barriers, number):
        self.all, self.number = barriers, number

    def arrive(self):
        every, n = self.all, self.number
        with every.changed:
            every.arrived[n] += 1
            if every.arrived[n] == every.needed:
                every.arrived[n] = 0
                every.phases[n] += 1
                every.changed.notify_all()

    def wait(self):
        every, n, warpgroup = self.all, self.number, current.warpgroup
        with every.changed:
            before = every.waited[n].get(warpgroup, 0)
            begun = time.monotonic()
            while not every.changed.wait_for(lambda: every.phases[n] > before, 0.1):
                if current.failed.is_set() or time.monotonic() - begun > TIMEOUT:
                    raise RuntimeError("too few have arrived at this barrier")
            # A GPU's thread knows only whether the number of the phase is even.
            assert every.phases[n] < before + 2, "waits for a phase after the next one"
            every.waited[n][warpgroup] = before + 1


class Accumulator:
    """In place of ``plgpu.ACC``."""

    def __call__(self, shape, dtype):
        return Ref(np.zeros(shape, np.float32))

    @staticmethod
    def init(x):
        return x


class Program(threading.local):
    """The program that this thread runs: its axes, and what its warpgroups share."""

    axes: dict
    shared: dict
    lock: threading.Lock
    scopes: int
    failed: threading.Event
    warpgroup: int


current = Program()
launches: list[str] = []
"""Names of the kernels that `simulated` has run."""


def kernel(body, *, out_type, grid, grid_names, num_threads=1, thread_name="thread", **_):
    """As ``plgpu.kernel``: outputs begin as NaN."""

    def call(*operands):
        launches.append(body.__name__)
        given = [x for x in operands if isinstance(x, jax.Ref)]
        inputs = [Ref(np.array(x[...] if isinstance(x, jax.Ref) else x)) for x in operands]
        outputs = [Ref(_garbage(x.shape, x.dtype)) for x in out_type]
        with ThreadPoolExecutor(num_threads) as pool:
            for index in np.ndindex(*grid):
                shared, lock, failed = {}, threading.Lock(), threading.Event()

                def run(warpgroup, index=index, shared=shared, lock=lock, failed=failed):
                    current.axes = dict(
                        zip((*grid_names, thread_name), (*index, warpgroup), strict=True)
                    )
                    current.shared, current.lock, current.scopes, current.failed = (
                        shared,
                        lock,
                        0,
                        failed,
                    )
                    current.warpgroup = warpgroup
                    try:
                        body(*inputs, *outputs)
                    except BaseException:
                        failed.set()
                        raise

                futures = [pool.submit(run, n) for n in range(num_threads)]
                errors = [e for future in futures if (e := future.exception()) is not None]
                if errors:  # threads that wait for one that has failed raise a RuntimeError
                    raise min(errors, key=lambda e: isinstance(e, RuntimeError))
        changed = [y for x, y in zip(operands, inputs, strict=True) if isinstance(x, jax.Ref)]
        for ref, result in zip(given, changed, strict=True):
            ref[...] = jnp.asarray(result.array)
        return [jnp.asarray(x.array) for x in outputs]

    return call


def run_scoped(body, *types, collective_axes=()):
    """As ``pl.run_scoped``; with axes, warpgroups share what it allocates."""
    if not collective_axes:
        return body(*_allocate(types))
    number, current.scopes = current.scopes, current.scopes + 1
    with current.lock:
        if number not in current.shared:
            current.shared[number] = _allocate(types)
    return body(*current.shared[number])


def run_state(body):
    """As ``pl.run_state``."""

    def call(values):
        refs = jax.tree.map(lambda x: Ref(np.array(x)), values)
        body(refs)
        return jax.tree.map(lambda x: jnp.asarray(x.array), refs)

    return call


def when(condition):
    """As ``pl.when``."""
    return lambda body: body() if condition else None


def cond(condition, yes, no, *operands):
    """As ``lax.cond``."""
    return (yes if condition else no)(*operands)


def fori_loop(begin, end, body, carry):
    """As ``lax.fori_loop``."""
    for n in range(int(begin), int(end)):
        carry = body(jnp.int32(n), carry)
    return carry


def wgmma(accumulator, left, right):
    """As ``plgpu.wgmma``."""
    left, right = (_single(x) for x in (left, right))
    accumulator.array += left @ right


def copy_gmem_to_smem(src, dst, barrier):
    """As ``plgpu.copy_gmem_to_smem``: zeros come from outside an array."""
    dst.array[...] = 0
    dst.array[tuple(slice(n) for n in src.shape)] = src.array
    _one(barrier).arrive()


def copy_smem_to_gmem(src, dst, *, commit_group=True, reduction_op=None):
    """As ``plgpu.copy_smem_to_gmem``: what is outside an array is left out.

    Vectors are refused there: Pallas stores them by a plain copy of bytes, which would go on into
    the next row.
    """
    del commit_group
    if dst.array.ndim == 1 and reduction_op is None:
        assert dst.shape == src.shape, "a plain copy writes behind the end of a row"
    values = src.array[tuple(slice(n) for n in dst.shape)]
    if reduction_op is None:
        dst.array[...] = values
    else:
        assert reduction_op == "add"
        dst.array += values


def inline_mgpu(*, arg_types, return_type=None):
    """As ``plgpu.inline_mgpu``, for the functions of `pallas_kernels`, by their names."""
    del arg_types

    def signal_and_wait(signal, signals, wait_for, value):
        if signals:
            signal.array += 1
        assert wait_for.array >= value, "waits for a program that has not begun"

    def signal_after_stores(signal):
        signal.array += 1

    def store_registers(ref, x):
        ref.array[...] = np.asarray(x).reshape(ref.shape)

    def load_registers(ref):
        return jnp.asarray(np.array(ref.array)).reshape(return_type.shape)

    meanings = {
        "identity": lambda x: x,
        "fence": lambda: None,
        "replace_async_copy": lambda: None,
        "vote": lambda x: jnp.int32((x != 1).any()),
        "signal_and_wait": signal_and_wait,
        "signal_after_stores": signal_after_stores,
        "store_registers": store_registers,
        "load_registers": load_registers,
    }
    return lambda function: meanings[function.__name__]


@contextlib.contextmanager
def simulated():
    """Inside, kernels of Mosaic GPU run current."""
    stand_ins = {
        plgpu: dict(
            kernel=kernel,
            wgmma=wgmma,
            inline_mgpu=inline_mgpu,
            ACC=Accumulator(),
            copy_gmem_to_smem=copy_gmem_to_smem,
            copy_smem_to_gmem=copy_smem_to_gmem,
            barrier_arrive=lambda barrier: _one(barrier).arrive(),
            barrier_wait=lambda barrier: _one(barrier).wait(),
            wgmma_accumulator_load=lambda ref, **_: ref[...],
            load=lambda ref, **_: ref[...],
            broadcasted_iota=lambda *args, **_: lax.broadcasted_iota(*args),
            layout_cast=lambda x, _: x,
            **dict.fromkeys(AT_ONCE, lambda *_, **__: None),
        ),
        pl: dict(run_scoped=run_scoped, run_state=run_state, when=when),
        lax: dict(
            cond=cond,
            fori_loop=fori_loop,
            axis_index=lambda name: jnp.int32(current.axes[name]),
        ),
    }
    launches.clear()
    with pytest.MonkeyPatch.context() as patch:
        for module, names in stand_ins.items():
            for name, value in names.items():
                patch.setattr(module, name, value, raising=False)
        yield


def _one(barrier):
    return barrier if isinstance(barrier, OneBarrier) else barrier[0]


def _allocate(types):
    def allocate(kind):
        if isinstance(kind, Ref):  # an accumulator
            return Ref(np.array(kind.array))
        if isinstance(kind, plgpu.Barrier):
            return Barrier(kind.num_arrivals, int(np.prod(kind.num_barriers)))
        if isinstance(kind, plgpu.RefUnion):
            sizes = [np.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in kind.refs]
            memory = np.full(max(sizes), 255, np.uint8)  # NaN
            return [
                Ref(memory[:size].view(jnp.dtype(x.dtype)).reshape(x.shape))
                for x, size in zip(kind.refs, sizes, strict=True)
            ]
        return Ref(_garbage(kind.shape, kind.dtype))

    return jax.tree.map(allocate, types, is_leaf=lambda x: not isinstance(x, dict | list | tuple))


def _garbage(shape, dtype):
    floating = jnp.issubdtype(dtype, jnp.floating)
    return np.full(shape, np.nan if floating else -(2**30), jnp.dtype(dtype))


def _single(x):
    array = x.array if isinstance(x, Ref) else np.asarray(x)
    assert array.dtype in (ml_dtypes.bfloat16, np.float16)
    return array.astype(np.float32)


def _numpy_index(index):
    def one(x):
        if isinstance(x, pl.Slice):
            return slice(int(x.start), int(x.start) + x.size)
        return x if x is Ellipsis or isinstance(x, slice) else int(x)

    return tuple(map(one, index)) if isinstance(index, tuple) else one(index)
