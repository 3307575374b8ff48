"""Draws docs/mask.png, mask_both_sides.png and tiles.png: `python docs/make_mask_figures.py`.

Masks and tiles are those of the library: the functions that the kernels use say what to fill.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from pallas_kernels._masks import in_window, sees
from pallas_kernels._tile_ranges import KeyColumns, key_plan, query_plan
from ring_swa_jax._segments import segment_starts

from _drawing import COLORS, cell, save

DEVICES, CHUNK, WINDOW, SINKS = 4, 6, 4, 2
AFTER = 3  # keys after a query, in the second picture
DOCUMENTS = [10, 11, 3]  # their lengths; the last three tokens are the third one's
TILE, TILES, TILED_WINDOW = 4, 8, 13
UNMASKED, MASKED = "#4477aa", "#cc6677"


def frame(axes: Axes, length: int, step: int) -> None:
    """A square of queries and keys with lines at every chunk or tile."""
    for boundary in range(0, length + 1, step):
        axes.axhline(boundary, color="0.75", linewidth=0.8, zorder=0)
        axes.axvline(boundary, color="0.75", linewidth=0.8, zorder=0)
    axes.set(xlim=(-0.05, length), ylim=(length, -0.05), aspect="equal")
    axes.set_xticks(range(0, length + 1, step))
    axes.set_yticks(range(0, length + 1, step))
    axes.tick_params(length=0)
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")


def draw_mask(figure: Figure, axes: Axes, after: int = 0) -> None:
    """Which keys every query sees, and who holds them; ``after`` of them are after the query."""
    length = DEVICES * CHUNK
    documents = jnp.repeat(jnp.arange(len(DOCUMENTS)), jnp.array(DOCUMENTS))
    lengths = jnp.array(DOCUMENTS)[documents][:, None]
    i, j = jnp.arange(length)[:, None], jnp.arange(length)
    # Kernels know windows that end with the query: keys are moved to the front (`Spec`).
    start = segment_starts(documents[None])[0][:, None] - after
    j, window = j - after, WINDOW + after
    seen = np.asarray(sees(i, j, start, window, SINKS, packed=True, end=start + lengths))
    windowed = np.asarray(in_window(i, j, start, window))
    for query, key in zip(*seen.nonzero(), strict=True):
        elsewhere = query // CHUNK != key // CHUNK
        color = COLORS[key // CHUNK]
        cell(axes, key, query, color, hatch="//////" if elsewhere else None)
        if not windowed[query, key]:
            axes.plot(key + 0.5, query + 0.5, "o", color="black", markersize=4)
    frame(axes, length, CHUNK)
    end = 0
    for number, tokens in enumerate(DOCUMENTS):
        axes.add_patch(
            Rectangle((end, end), tokens, tokens, fill=False, edgecolor="black", linewidth=1.5)
        )
        axes.text(
            end + tokens + 0.4, end + min(tokens / 2, 2), f"document {number + 1}", va="center"
        )
        end += tokens
    for device in range(DEVICES):
        axes.text(
            -0.4,
            (device + 0.5) * CHUNK,
            f"device {device}",
            color=COLORS[device],
            rotation=90,
            ha="right",
            va="center",
        )
    axes.set_ylabel("query position", labelpad=22)
    axes.set_yticks([])
    handles = [
        Patch(facecolor=COLORS[0], label="a key on the query's own device"),
        Patch(facecolor="white", edgecolor=COLORS[0], hatch="//////", label="one that travels"),
        pyplot.Line2D([], [], color="black", marker="o", linestyle="", markersize=4,
                      label="a sink outside the window"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=10)


def draw_tiles(axes: Axes, *, by_query: bool) -> None:
    """The tiles that one row or column of tiles visits, and which of them need a mask."""
    length = TILES * TILE
    sizes: dict[str, Any] = {"query_tile": TILE, "key_tile": TILE, "offset": 0, "length": length}
    start = jnp.zeros((), jnp.int32)
    if by_query:
        plan = key_plan(start, TILED_WINDOW, 0, rows=(0, length), **sizes)[:, KeyColumns.BEGIN :]
    else:
        plan = query_plan(start, TILED_WINDOW, 0, rows=length, min_distance=1, **sizes)
    for tile, (begin, unmasked_begin, unmasked_end, end) in enumerate(np.asarray(plan)):
        for other in range(begin, end):
            unmasked = unmasked_begin <= other < unmasked_end
            x, y = (other, tile) if by_query else (tile, other)
            color = UNMASKED if unmasked else MASKED
            size = {"width": float(TILE), "height": float(TILE)}
            cell(axes, x * TILE, y * TILE, color, hatch=None if unmasked else "////", **size)
    frame(axes, length, TILE)
    i, j = jnp.arange(length)[:, None], jnp.arange(length)
    seen = np.asarray(in_window(i, j, None, TILED_WINDOW))
    edges = np.stack((seen.argmax(axis=1), np.arange(length) + 1), axis=1)
    rows = np.repeat(np.arange(length + 1), 2)[1:-1]
    axes.plot(np.repeat(edges, 2, axis=0), rows, color="black", linewidth=1.4)
    corner = (0, 5 * TILE) if by_query else (2 * TILE, 0)
    across = (length, TILE) if by_query else (TILE, length)
    axes.add_patch(
        Rectangle(corner, *across, fill=False, edgecolor="black", linewidth=2.2, zorder=4)
    )
    axes.set_title(
        "A tile of queries and its keys" if by_query else "A tile of keys and its queries"
    )


def main() -> None:
    """Writes all pictures."""
    pyplot.rcParams.update({"font.size": 11})
    for name, after in (("mask", 0), ("mask_both_sides", AFTER)):
        figure, axes = pyplot.subplots(figsize=(7.4, 7), layout="constrained")
        draw_mask(figure, axes, after)
        save(figure, name)

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 5.1), layout="constrained")
    draw_tiles(left, by_query=True)
    draw_tiles(right, by_query=False)
    handles = [
        Patch(facecolor=UNMASKED, label="unmasked: every query sees every key, no mask"),
        Patch(facecolor="white", edgecolor=MASKED, hatch="////", label="at an edge: masked"),
        Patch(facecolor="white", edgecolor="0.75", label="never visited"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=10.5)
    save(figure, "tiles")


if __name__ == "__main__":
    main()
