"""Two cases of one shape, stacked for vmap."""

import dataclasses

import jax
import jax.numpy as jnp

from tests.helpers.cases import Case
from tests.helpers.oracle import Result
from tests.helpers.routes import (
    compare,
    documents_of,
)

WHOLE = Case(5, 4, 7, sinks=2, batch=2, learned=True, heads=(4, 2))


PACKED = Case(5, 4, 7, 2, ((4, 7, 9),), packed=True, learned=True, heads=(4, 2))


OTHER_DOCUMENTS = ((11, 0, 6, -3),)


def twins(case):
    """Two cases of one shape: other numbers, and other documents where there are any."""
    documents = OTHER_DOCUMENTS if case.packed else case.documents
    return case, dataclasses.replace(case, seed=1, documents=documents)


def stacked(pair):
    """Arguments of `with_gradients` with a new leading axis."""
    rows = [(*case.arrays()[0], documents_of(case), case.arrays()[1]) for case in pair]
    rows = [(*row[:4], padded(row[4]), row[5]) for row in rows]
    return jax.tree.map(lambda *x: jnp.stack(x), *rows)


def padded(documents):
    """Repeats the last entry of cu_seqlens, so that both have five; leaves segment_ids alone."""
    if documents is None or documents.ndim == 2:
        return documents
    return jnp.concatenate([documents, documents[-1:].repeat(5 - len(documents))])


def compare_each(result, pair):
    for i, case in enumerate(pair):
        compare(Result(*(x[i] for x in result)), case.expected, case.dtype, case)
