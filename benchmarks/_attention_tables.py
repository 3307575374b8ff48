"""What the comparison on one GPU found, as tables for a page."""

from typing import Any

from benchmarks import _markdown
from benchmarks._report import KINDS
from benchmarks._report import TITLES as PASSES
from benchmarks._shapes import ALL, BOTH_SIDES, SHAPES, Shape
from benchmarks._timing import ratio_quartiles

Entry = dict[str, Any]
Found = dict[str, dict[str, Entry]]
"""{shape: {contender: its entry in a JSON}}."""

OURS, ANY_ORDER = "mosaic_gpu", "mosaic_gpu_nondeterministic"
TITLES = {
    OURS: f'"{OURS}"',
    ANY_ORDER: f'"{ANY_ORDER}"',
    "triton": '"triton"',
    "fa3": "FlashAttention-3",
    "fa3-deterministic": "FlashAttention-3, deterministic",
    "cudnn": "cuDNN",
    "torch-flex": "torch flex_attention",
}
PEERS = (OURS, "fa3", "cudnn")
TABLES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (tuple(SHAPES), (OURS, "triton", "fa3", "cudnn", "tokamax", "torch-flex")),
    (tuple(SHAPES), (OURS, ANY_ORDER, "fa3-deterministic", "fa3")),
    (
        ("mistral-packed", "mistral-23", "mistral-60", "long-gqa-packed", "long-gqa-23", "full-23"),
        PEERS,
    ),
    (("full16k", "full32k", "full-64", "not-causal"), (OURS, ANY_ORDER, "fa3", "cudnn")),
    (tuple(BOTH_SIDES)[:3], PEERS),
    (("batch-2k", "batch-8k", "batch-4k-64", "batch-4k-window"), PEERS),
    (("long-gqa-odd", "full16k-odd"), PEERS),
)
"""Shapes and contenders of each."""
SINKS = {"long-gqa-sinks": "long-gqa", "gptoss-learned": "gptoss", "mimo": None}
"""A shape with sinks to the same without."""
LEVEL = 0.05
"""Times that differ by less, as a part of the greater one, are level."""
REASONS = {
    "takes no sinks": "takes no sinks",
    "RESOURCE_EXHAUSTED": "out of memory",
    "head_size <= max_headdim": "refuses this head size",
    "Unsupported sequence length": "refuses this length",
    "support right window": "has no window to the right",
}
"""Part of a reason to a cell."""


def tables(rows: list[Entry]) -> list[str]:
    """Each of `TABLES`, that of `SINKS`, and where a peer is faster than ours: what has lines."""
    found: Found = {}
    for row in rows:
        found.setdefault(row["shape"], {})[row["name"]] = row
    several = [_beside(found, shapes, names) for shapes, names in TABLES]
    return [table for table in (*several, _with_sinks(found), _behind(found)) if table]


def _beside(found: Found, shapes: tuple[str, ...], names: tuple[str, ...]) -> str:
    """Milliseconds, the fastest in bold."""
    head = ["tokens, heads, head size, window_size", *(TITLES.get(name, name) for name in names)]
    lines = []
    for shape in (x for x in shapes if x in found):
        entries = [found[shape].get(name, {}) for name in names]
        least = {
            kind: min(entry[f"{kind}_ms"] for entry in entries if f"{kind}_ms" in entry)
            for kind in KINDS
        }
        lines.append([label(ALL[shape]), *(_cell(entry, least) for entry in entries)])
    return _markdown.table(head, lines)


def _with_sinks(found: Found) -> str:
    """Ours, beside the same shape without sinks."""
    head = ["tokens, heads, head size, window_size", "without sinks", "with sinks", "ratio"]
    lines = []
    for name, plain in SINKS.items():
        if name not in found:
            continue
        entry, base = found[name][OURS], found.get(plain or "", {}).get(OURS, {})
        ratios = (f"{entry[f'{x}_ms'] / base[f'{x}_ms']:.2f}" for x in KINDS) if base else "-"
        lines.append([label(ALL[name]), _cell(base), _cell(entry), " / ".join(ratios)])
    return _markdown.table(head, lines)


def _behind(found: Found) -> str:
    """By how much less time a peer takes, by the rounds' ratios: all that is not level."""
    lines = []
    for name, entries in found.items():
        cells = [_ahead(entries, kind) for kind in KINDS]
        if any(cells):
            lines.append([label(ALL[name]), *(cell or "level or behind" for cell in cells)])
    return _markdown.table(
        ["tokens, heads, head size, window_size", *(PASSES[kind] for kind in KINDS)], lines
    )


def _ahead(entries: dict[str, Entry], kind: str) -> str:
    """The peers that take less time than ours in a pass."""
    faster = []
    for name in PEERS[1:]:
        times, base = (entries.get(x, {}).get("rounds", {}).get(kind, []) for x in (name, OURS))
        ratio = ratio_quartiles(times, base)
        if ratio is not None and 1 - ratio[1] >= LEVEL:
            faster.append(f"{TITLES[name]}, {1 - ratio[1]:.0%}")
    return "; ".join(faster)


def label(shape: Shape) -> str:
    """The first cell of a line."""
    tokens = f"{shape.batch} x {shape.length}" if shape.batch > 1 else str(shape.length)
    dims = str(shape.dim) if shape.value_dim is None else f"{shape.dim} and {shape.value_dim}"
    after = [
        f"{len(shape.documents)} documents" if shape.documents else "",
        f"{shape.sinks} sink tokens" if shape.sinks else "",
        "learned sinks" if shape.learned else "",
    ]
    plain = f"{tokens}, {shape.heads}/{shape.kv_heads}, {dims}, {shape.window_size}"
    return "; ".join([plain, *(x for x in after if x)])


def _cell(entry: Entry, least: dict[str, float] | None = None) -> str:
    """Forward / forward and backward, or why there is none."""
    if f"{KINDS[0]}_ms" not in entry:
        reason = entry.get("reason") or ""
        return next((cell for part, cell in REASONS.items() if part in reason), "-")
    best = [least is not None and entry[f"{kind}_ms"] == least[kind] for kind in KINDS]
    times = [f"{entry[f'{kind}_ms']:.3f}" for kind in KINDS]
    if all(best):
        return f"**{' / '.join(times)}**"
    return " / ".join(f"**{x}**" if b else x for x, b in zip(times, best, strict=True))
