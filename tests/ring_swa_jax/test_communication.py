"""What moves between devices, read from the compiled program, in float32 (CPU widens bf16).

Per device, with Wh = min(W, (devices - 1) * T) and c = 1..ceil(Wh / T):

* halo, forward: one permute per hop of min(T, W - (c - 1) T) * B * K * (H + Hv) * 4 bytes;
* halo, backward: as much again travels home; with several hops they are also fetched again;
* sinks: one reduce-scatter of devices * B * num_sinks * K * (H + Hv) * 4 bytes forward, one
  all-gather of as much backward;
* segment_ids: one all-gather of three int32 per batch row and device; cu_seqlens: nothing;
* learned sinks: one sum of N numbers backward.
"""

import dataclasses

import pytest

from tests.helpers.cases import Case
from tests.helpers.ring_programs import CHUNK, programs, script_case, with_devices
from tests.helpers.routes import over_mesh

T, DEVICES = 8, 8
WINDOWS = [0, T - 1, T, T + 1, 3 * T - 3, 8 * T - 2]
MAY_MOVE = {"collective-permute", "reduce-scatter", "all-gather", "all-reduce"}


def row_bytes(case):
    """Bytes of one token's keys and values, over the batch."""
    return case.batch * case.heads[1] * sum(case.dims) * 4


def hop_lengths(case):
    """Tokens of each hop."""
    halo_keys = (case.devices - 1) * case.chunk
    halo_keys = halo_keys if case.window is None else min(case.window, halo_keys)
    return [min(case.chunk, halo_keys - begin) for begin in range(0, halo_keys, case.chunk)]


def moved(found, kind):
    """Bytes per device of one kind of collective."""
    return sum(one.bytes for one in found if one.kind == kind)


def hops(found):
    """Sorted (distance, bytes) of the permutes; each must be non-cyclic and outside of loops."""
    result = []
    for one in found:
        assert not one.in_loop, one
        if one.kind == "collective-permute":
            (distance,) = {b - a for a, b in one.pairs}  # one distance: nobody wraps around
            sources = {a for a, _ in one.pairs}
            assert len(sources) == len(one.pairs) > 0
            result.append((distance, one.bytes))
    return sorted(result)


def hops_by_formula(case):
    """What `hops` must give, forward and backward."""
    lengths = hop_lengths(case)
    fetch = [(c, n * row_bytes(case)) for c, n in enumerate(lengths, 1)]
    home = [(-c, n) for c, n in fetch]
    return fetch, sorted(home + (fetch if len(lengths) > 1 else []))


@pytest.mark.parametrize("window", WINDOWS)
def test_halo_bytes_equal_the_formula(window, implementation):
    case = Case(T, DEVICES, window, batch=2, heads=(4, 2), dims=(16, 32))
    forward, backward = programs(case, "shard_novma", implementation)
    assert (hops(forward), hops(backward)) == hops_by_formula(case)
    assert {one.kind for one in forward + backward} <= {"collective-permute"}


@pytest.mark.parametrize("window", [(3, 5), pytest.param((T + 2, 2 * T), marks=pytest.mark.slow)])
def test_halos_of_both_sides_move_what_the_formula_says(window):
    """The keys before and those after a chunk, and their gradients; nothing is fetched again."""
    case = Case(T, DEVICES, window, batch=2, heads=(4, 2), dims=(16, 32))
    fetch = [
        (side * hop, tokens * row_bytes(case))
        for side, keys in zip((1, -1), window, strict=True)
        for hop, tokens in enumerate(hop_lengths(dataclasses.replace(case, window=keys)), 1)
    ]
    home = [(-distance, size) for distance, size in fetch]
    forward, backward = programs(case, "shard_novma", "xla")
    assert (hops(forward), hops(backward)) == (sorted(fetch), sorted(home))


@pytest.mark.parametrize("window", [5, pytest.param(2 * CHUNK + 3, marks=pytest.mark.slow)])
def test_bytes_do_not_grow_with_the_mesh(window, implementation):
    few = programs(script_case(8, window, 0), "shard_novma", implementation)
    many = with_devices(32, window, 0, implementation)
    for a, b in zip(few, many, strict=True):
        assert hops(a) == hops(b) != []
        assert len(a) == len(b)


@pytest.mark.parametrize("window", [0, 5, 2 * T + 3])
def test_sinks_move_in_one_small_collective(window, implementation):
    case = Case(T, DEVICES, window, sinks=3, batch=2, heads=(4, 2))
    limit = DEVICES * case.sinks * row_bytes(case)
    found = programs(case, "shard_novma", implementation)
    for some, halo in zip(found, hops_by_formula(case), strict=True):
        assert hops(some) == halo
        assert {one.kind for one in some} <= MAY_MOVE
        rest = [one for one in some if one.kind != "collective-permute"]
        assert len(rest) == 1, rest
        # Reduce-scatter shows its result, one device's part; the others show the whole.
        part = DEVICES if rest[0].kind == "reduce-scatter" else 1
        assert rest[0].bytes * part == limit


@pytest.mark.parametrize("sinks", [0, 2])
def test_segment_ids_gather_three_numbers(sinks, implementation):
    documents = ((30, 34), (9, 20, -3, 32))
    case = Case(T, DEVICES, 5, sinks, documents, batch=2)
    forward, backward = programs(case, "global", implementation)
    sink_bytes = DEVICES * sinks * row_bytes(case)
    assert moved(forward, "all-gather") == 3 * 4 * case.batch * DEVICES
    assert moved(backward, "all-gather") <= sink_bytes
    assert len(hops(forward)) == len(hops(backward)) == 1
    assert moved(forward, "all-reduce") + moved(backward, "all-reduce") <= 2 * sink_bytes


def test_cu_seqlens_move_nothing(implementation):
    case = Case(T, DEVICES, 5, documents=((9, 30, 20, -5),), packed=True)
    forward, backward = programs(case, "shard_novma", implementation)
    assert hops(forward) == [(1, 5 * row_bytes(case))]
    assert hops(backward) == [(-1, 5 * row_bytes(case))]
    assert len(forward) == len(backward) == 1


def test_learned_sinks_add_one_small_sum(implementation, check_vma):
    case = Case(T, DEVICES, 5, learned=True, heads=(4, 2))
    route = "shard" if check_vma else "shard_novma"
    forward, backward = programs(case, route, implementation)
    assert len(forward) == 1
    assert [(x.kind, x.bytes) for x in backward if x.kind != "collective-permute"] == [
        ("all-reduce", 4 * case.heads[0])
    ]


def test_batch_and_heads_on_other_axes_move_nothing_more(implementation):
    """A forgotten axis would gather q, k or v over it in silence."""
    case = Case(T, 2, 5, batch=2, heads=(4, 2))
    axes = dict(batch_axis="data", seq_axis="seq", head_axis="model")
    route = over_mesh(sizes=dict(data=2, seq=2, model=2), **axes)
    forward, backward = programs(case, route, implementation, sharded=("data", "seq", "model"))
    assert {x.kind for x in forward + backward} == {"collective-permute"}
    assert moved(forward, "collective-permute") == 5 * row_bytes(case) // 4
