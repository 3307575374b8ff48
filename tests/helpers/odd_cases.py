"""The odd cases by name: windows at chunk edges, fetched sinks, documents at edges, padding."""

from tests.helpers.cases import Case

# Documents of two rows over 4 chunks of 6: ends on, before and after an edge; padding inside.
TWO_ROWS = ((6, 5, 2, 11), (7, -3, 1, 8, -5))

ODD = {
    # windows: 0, next to one chunk, next to several, longer than everything
    "window_0": Case(5, 4, 0),
    "window_0_learned": Case(5, 3, 0, learned=True),
    "window_chunk_minus_1": Case(7, 4, 6, batch=2),
    "window_chunk": Case(7, 4, 7, heads=(4, 2)),
    "window_chunk_plus_1": Case(7, 4, 8, dims=(16, 32)),
    "window_2_chunks": Case(6, 5, 12, softcap=2.0),
    "window_2_chunks_plus_1": Case(6, 5, 13),
    "window_is_length": Case(5, 3, 15),
    "window_beyond_length": Case(5, 3, 1000, learned=True),
    "window_none": Case(5, 8, None, heads=(3, 1)),
    "chunk_of_one_token": Case(1, 8, 3, sinks=1),
    "chunk_of_one_token_window_0": Case(1, 7, 0),
    # sinks: as long as the chunk, of a sequence that began devices ago or across an edge
    "sinks_whole_chunk": Case(4, 5, 2, sinks=4, learned=True),
    "sinks_overlap_window": Case(6, 3, 5, sinks=6),
    "sinks_window_none": Case(6, 3, None, sinks=3),
    "sinks_window_0": Case(6, 4, 0, sinks=2, heads=(4, 2)),
    "sinks_began_devices_ago": Case(4, 7, 1, sinks=2, documents=((3, 25),), packed=True),
    "sinks_straddle_edge": Case(5, 6, 3, sinks=4, documents=((4, 26),), packed=True),
    "sinks_straddle_edge_rows": Case(
        5, 5, 2, sinks=5, documents=((4, 21), (9, 16), (1, 24)), batch=3, learned=True
    ),
    "sinks_longer_than_sequence": Case(
        6, 4, 1, sinks=5, documents=((2, 3, 1, 18), (20, 1, 1, 2)), batch=2
    ),
    "sinks_one_device": Case(9, 1, 2, sinks=12),
    # documents: edges, empty ones, rows that differ, padding
    "packed_edges": Case(6, 4, 4, documents=((6, 5, 2, 11),), packed=True, heads=(4, 2)),
    "packed_empty": Case(6, 4, 7, documents=((0, 6, 0, 0, 6, 9, 0, 0, -3),), packed=True),
    "packed_last_repeated": Case(5, 3, 3, sinks=1, documents=((8, 7, 0, 0),), packed=True),
    "packed_all_padding": Case(4, 3, 3, sinks=1, documents=((0, 0, -12),), packed=True),
    "packed_padding_devices": Case(4, 6, 5, documents=((9, -15),), packed=True, learned=True),
    "packed_single_tokens": Case(
        3, 4, 4, sinks=1, documents=((1,) * 7 + (5,),), packed=True, learned=True
    ),
    "rows_differ": Case(6, 4, 4, documents=TWO_ROWS, batch=2, learned=True),
    "rows_differ_hops": Case(6, 4, 13, sinks=3, documents=TWO_ROWS, batch=2),
    "rows_one_all_padding": Case(5, 4, None, 2, ((-20,), (20,)), batch=2, learned=True),
    "rows_padding_first": Case(5, 4, 6, 2, ((-7, 13), (-1, 4, -6, 9)), batch=2, learned=True),
    # dtypes
    "bfloat16": Case(8, 4, 9, sinks=2, dtype="bfloat16", learned=True, heads=(4, 2)),
    "float16": Case(8, 4, 9, sinks=2, dtype="float16", learned=True, heads=(4, 2)),
}
