"""The schedule of the Mosaic GPU forward kernel: every pair of query and key once, and no other.

The scheduler reads arrays as it reads refs, so its tiles are looked at one by one.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import _masks
from pallas_kernels._kernels import ForwardInputs
from pallas_kernels._mosaic_gpu.forward.scheduler import TileScheduler
from pallas_kernels._mosaic_gpu.forward.softmax import first_key_of_all
from pallas_kernels._mosaic_gpu.forward.tile_finder import TileFinder
from pallas_kernels._mosaic_gpu.forward.work_tile import WorkTile
from pallas_kernels._mosaic_gpu.primitives import ROWS
from pallas_kernels._mosaic_gpu.tiles import SHARED_MEMORY, MosaicTiles, mosaic_tiles
from pallas_kernels._spec import KeyRun, SinkRun, Spec
from tests.helpers.models import MODELS


@dataclasses.dataclass(frozen=True)
class Shard:
    """Queries of a shard, and what it has of keys; ``documents`` start there, one row each."""

    length: int
    window: int | None
    tiles: MosaicTiles
    sinks: int = 0
    halo: int = 0
    fetched: bool = False
    documents: tuple[tuple[int, ...], ...] | None = None
    rows: tuple[int, int] | None = None
    local: bool = True

    def starts(self):
        """[B, T]."""
        first = -self.halo - 70 if self.halo or self.fetched else 0
        starts = np.full((len(self.documents or [()]), self.length), first, np.int32)
        for row, begins in zip(starts, self.documents or [()], strict=True):
            for begin in begins:
                row[begin:] = begin
        return starts


SMALL, PACKED = MosaicTiles(32, 2), MosaicTiles(48, 2, heads=8, warpgroups=3)
ROWS_OF_TWO = ((9, 64, 65, 150), (130,))
SHARDS = {
    "window": Shard(264, 134, SMALL),
    "window_0": Shard(136, 0, PACKED),
    "full": Shard(200, None, SMALL),
    "group": Shard(200, 126, PACKED),
    "halo": Shard(256, 104, SMALL, halo=104),
    "halo_rows": Shard(384, 104, SMALL, halo=104, rows=(0, 128)),
    "halo_alone": Shard(256, 300, SMALL, halo=256, local=False),
    "sinks": Shard(200, 40, SMALL, sinks=5),
    "sinks_group": Shard(200, 100, PACKED, sinks=33),
    "documents": Shard(200, 134, SMALL, documents=ROWS_OF_TWO),
    "documents_without_window": Shard(200, None, SMALL, documents=ROWS_OF_TWO),
    "documents_sinks": Shard(200, 40, PACKED, sinks=5, documents=ROWS_OF_TWO),
    "fetched": Shard(256, 40, SMALL, sinks=20, halo=40, fetched=True),
    "fetched_documents": Shard(
        200, 40, PACKED, sinks=20, halo=40, fetched=True, documents=ROWS_OF_TWO
    ),
}


def schedule_of(shard):
    """The TileScheduler of a launch over the shard."""

    def keys(length):
        return jnp.zeros((len(shard.starts()), length, 1, 16), jnp.bfloat16)

    local, halo = keys(shard.length), keys(shard.halo)
    runs = [KeyRun(halo, halo, -shard.halo)] if shard.halo else []
    runs += [KeyRun(local, local, 0)] if shard.local else []
    sinks = SinkRun(*[keys(shard.sinks).astype(jnp.float32)] * 2) if shard.fetched else None
    start = jnp.asarray(shard.starts() if shard.documents else shard.starts()[0, 0])
    query = jnp.zeros((*local.shape[:2], 8, 16), jnp.bfloat16)
    spec = Spec(shard.window, shard.sinks, 1.0, None, None)
    rows = shard.rows or (0, shard.length)
    inputs = ForwardInputs(query, tuple(runs), sinks, None, start)
    return TileScheduler(spec, inputs, rows, shard.tiles, 4)


def visited(shard, scheduler, tile, consumer, i, start):
    """How often each key from -halo - 70 on is seen by each of the positions i."""
    before = shard.halo + 70
    count = np.zeros((i.size, before + shard.length), int)

    def add(first, size, seen):
        j = int(first) + np.arange(size)
        mask = np.broadcast_to(seen(jnp.asarray(i)[:, None], jnp.asarray(j)), (i.size, size))
        exists = (j >= -before) & (j < shard.length)
        assert not mask[:, ~exists].any()
        count[:, j[exists] + before] += mask[:, exists]
        return mask

    starts = None
    if scheduler.packed:
        starts = scheduler.operands["start"][int(tile.batch_row), int(tile.row_group(consumer))]
    low = first_key_of_all(tile, consumer, starts)
    for n in range(int(tile.num_key_tiles)):
        first, stop = map(int, tile.key_range(n))

        def seen(i, j, stop=stop):
            mask = _masks.sees(
                i, j, start, shard.window, scheduler.num_sinks, packed=scheduler.packed
            )
            return np.asarray(mask & (j < stop if scheduler.has_halo else True))

        mask = add(first, shard.tiles.key, seen)
        if tile.is_unmasked(int(tile.first_position(consumer)), low, n):
            assert mask.all()
    for n in range(0 if tile.sinks is None else int(tile.sinks.num)):
        first, stop, fetched = (x.item() for x in tile.sink_range(n))

        def sink_seen(i, j, stop=stop, fetched=fetched):
            if not fetched:
                return np.asarray(_masks.sees_sink_before(i, j, start, shard.sinks, stop))
            seen = _masks.sees_fetched_sink(i, j, start, shard.window, shard.sinks)
            return np.asarray(seen) & (j < stop)

        add(first, scheduler.sink_tile, sink_seen)
    return count


@pytest.mark.parametrize("name", SHARDS)
def test_every_pair_once(name):
    shard = SHARDS[name]
    scheduler = schedule_of(shard)
    begin, end = scheduler.rows
    done = np.zeros((len(shard.starts()), end - begin, 8 // shard.tiles.heads), int)
    for index in range(scheduler.num_tiles):
        tile = TileFinder(scheduler, scheduler.operands).find(jnp.int32(index))
        row, head = int(tile.batch_row), int(tile.head_tile)
        assert int(tile.first_head) == head * shard.tiles.heads
        for consumer in range(shard.tiles.warpgroups):
            i = int(tile.first_position(consumer)) + np.arange(scheduler.positions_per_warpgroup)
            i = i[i < end]
            if not i.size:
                continue
            start = jnp.asarray(shard.starts()[row, i])[:, None]
            if scheduler.packed:
                loaded = scheduler.operands["start"][row, int(tile.row_group(consumer))].reshape(
                    -1, scheduler.positions_per_warpgroup
                )
                assert loaded.size == ROWS and (loaded[:, : i.size] == start[:, 0]).all()
            done[row, i - begin, head] += 1
            if head == 0:
                queries, j = jnp.asarray(i)[:, None], jnp.arange(-shard.halo - 70, shard.length)
                window = np.asarray(_masks.in_window(queries, j, start, shard.window))
                window = window & (j >= -shard.halo) & (shard.local | (j < 0))
                sink = np.asarray(_masks.is_sink(queries, j, start, shard.sinks))
                sink = sink & ((j >= 0) | shard.fetched)
                expected = (window | sink).astype(int)
                np.testing.assert_array_equal(
                    visited(shard, scheduler, tile, consumer, i, start), expected
                )
    assert (done == 1).all()


def tiles_of_programs(scheduler, monkeypatch):
    """The numbers of the tiles of each program."""
    found = []
    for program in range(scheduler.grid):
        monkeypatch.setattr(lax, "axis_index", lambda _, program=program: jnp.int32(program))
        count = int(scheduler.num_work_tiles())
        found.append([int(scheduler.work_tile(jnp.int32(n))) for n in range(count)])
    return found


@pytest.mark.parametrize("name", SHARDS)
def test_programs_share_all_tiles(name, monkeypatch):
    scheduler = schedule_of(SHARDS[name])
    programs = tiles_of_programs(scheduler, monkeypatch)
    assert sorted(itertools.chain(*programs)) == list(range(scheduler.num_tiles))


def test_programs_have_equal_work(monkeypatch):
    scheduler = schedule_of(Shard(1024, None, MosaicTiles(32, 2, heads=8)))
    assert scheduler.sorted_by_work
    finder = TileFinder(scheduler, scheduler.operands)
    work = [
        sum(int(finder.find(jnp.int32(index)).num_key_tiles) for index in tiles)
        for tiles in tiles_of_programs(scheduler, monkeypatch)
    ]
    assert max(work) - min(work) <= 2


@pytest.mark.parametrize(("runs", "rows"), [(2, 1), (40, 2)])
def test_numbers_pass_through_shared_memory(runs, rows):
    keys = jnp.zeros((2, 8, 1, 16), jnp.bfloat16)
    inputs = ForwardInputs(
        jnp.zeros((2, 64, 2, 16), jnp.bfloat16),
        tuple(KeyRun(keys, keys, 64 - 8 * n) for n in range(runs)),
        None,
        None,
        jnp.zeros((2, 64), jnp.int32),
    )
    spec = Spec(8 * runs, 0, 1.0, None, None)
    scheduler = TileScheduler(spec, inputs, (0, 64), MosaicTiles(64, 2), 4)
    tile = TileFinder(scheduler, scheduler.operands).find(jnp.int32(1))
    assert WorkTile.rows_of_numbers(scheduler) == rows
    numbers = np.full((rows, ROWS), -1)
    tile.store(numbers)
    loaded = WorkTile.load(scheduler, jnp.asarray(numbers, jnp.int32))
    assert jax.tree.structure(loaded) == jax.tree.structure(tile)
    assert list(map(int, jax.tree.leaves(loaded))) == list(map(int, jax.tree.leaves(tile)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_tiles_fit_into_shared_memory(name, sinks, whole):
    model = MODELS[name]
    (dim, value_dim), (heads, kv_heads) = model.dims, model.heads
    group = heads // kv_heads
    tiles = mosaic_tiles(dim, value_dim, model.window, group, whole=whole, sinks=sinks)
    used = tiles.shared_memory(dim, value_dim, whole=whole, sinks=sinks)
    assert 32 * 1024 < used <= SHARED_MEMORY
    assert group % tiles.heads == 0


def test_tiles_that_no_kernel_has():
    with pytest.raises(ValueError, match="multiple of 16"):
        MosaicTiles(40, 2)
    with pytest.raises(ValueError, match="no such launch"):
        MosaicTiles(64, 2, heads=3)
