"""Throughput over sequence length, ours beside FlashAttention-3 and cuDNN, on one GPU.

``python -m benchmarks.lengths``. As many tokens at every length, in a batch of sequences as long as
the length says, or packed into one row as documents whose lengths vary around it; as many features
with every head size. Prints tables, writes JSON and a picture for each head size.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import _report
from benchmarks._gpus import share_machine
from benchmarks._report import KINDS, TITLES, Row
from benchmarks._results import RESULTS, path_in, write
from benchmarks._shapes import Shape, random_documents
from benchmarks.attention import compare, machine

TOKENS, FEATURES, WINDOW = 131072, 2048, 1023
LENGTHS = tuple(1024 * 2**n for n in range(8))
DIMS = (128, 64, 256)
MASKS = {
    "causal": "causal",
    "window": f"causal, window_size={WINDOW}",
    "packed": "causal, documents of so many tokens on average",
}
NAMES = {
    "mosaic_gpu": ("this library", "#4477aa"),
    "fa3": ("FlashAttention-3", "#228833"),
    "cudnn": ("cuDNN", "#ccbb44"),
}
ROWS = tuple(f"{mask}-{dim}" for dim in DIMS for mask in MASKS)


def shapes(row: str, *, quick: bool) -> list[Shape]:
    """Those of a mask and a head size, from short to long; ``quick``: two tiny ones."""
    mask, size = row.split("-")
    heads, dim = FEATURES // int(size), int(size)
    found = []
    for length in LENGTHS:
        name, count = f"{row}-{length}", TOKENS // length
        if mask == "packed":
            documents = random_documents(count, TOKENS)
            found.append(Shape(name, TOKENS, heads, heads, dim, None, documents=documents))
        else:
            window = WINDOW if mask == "window" else None
            found.append(Shape(name, length, heads, heads, dim, window, batch=count))
    return [shape.tiny() for shape in found[3:5]] if quick else found


def series(rows: list[dict[str, Any]], row: str, name: str, kind: str) -> list[tuple[int, float]]:
    """(length, useful TFLOP/s) of one line of the picture."""
    found = []
    for entry in rows:
        prefix, length = entry["shape"].rsplit("-", 1)
        if prefix == row and entry["name"] == name and f"{kind}_tflops" in entry:
            found.append((int(length), entry[f"{kind}_tflops"]))
    return sorted(found)


def chart(path: Path) -> None:
    """A picture for each head size beside the JSON at ``path``: masks side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    document = json.loads(path.read_text())
    where, rows = document["machine"], document["rows"]
    for dim in DIMS:
        if not any(entry["shape"].split("-")[1] == str(dim) for entry in rows):
            continue
        figure, axes = plt.subplots(
            2, len(MASKS), figsize=(11, 6), sharex=True, sharey="row", layout="constrained"
        )
        for line, kind in zip(axes, KINDS, strict=True):
            for axis, (mask, title) in zip(line, MASKS.items(), strict=True):
                for name, (label, color) in NAMES.items():
                    points = series(rows, f"{mask}-{dim}", name, kind)
                    if points:
                        axis.plot(*zip(*points, strict=True), "o-", label=label, color=color)
                axis.set_xscale("log", base=2)
                axis.set_xticks(LENGTHS, [f"{x // 1024}k" for x in LENGTHS], fontsize=8)
                axis.minorticks_off()
                axis.set_ylim(bottom=0)
                axis.grid(alpha=0.3)
                axis.set_title(title if kind == "forward" else "", fontsize=9)
            line[0].set_ylabel(f"{TITLES[kind]}\nuseful TFLOP/s")
        for axis in axes[-1]:
            axis.set_xlabel("tokens of a sequence")
        handles = {
            label: handle
            for axis in axes.flat
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=len(NAMES), fontsize=9
        )
        figure.suptitle(
            f"{where['device']}, jax {where['jax']}, bfloat16, {FEATURES // dim} heads of {dim}, "
            f"{TOKENS // 1024}k tokens in all",
            fontsize=10,
        )
        figure.savefig(path.with_name(f"{path.stem}-{dim}.png"), dpi=120)
        plt.close(figure)


def main() -> None:
    """Compiles a row, times it, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--only", nargs="+", default=list(NAMES), help="contenders")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a smoke test")
    parser.add_argument("--output", type=Path, help="JSON to write; default: benchmarks/results/")
    parser.add_argument("--lock", type=Path, help="folder of locks, one for each GPU")
    arguments = parser.parse_args()
    share_machine()
    where = machine()
    output = arguments.output or path_in(RESULTS, "lengths", where)
    settings = {"rounds": arguments.rounds, "seconds": 0.001 if arguments.quick else 0.03}
    rows: list[Row] = []
    for row in arguments.rows:
        wanted = shapes(row, quick=arguments.quick)
        for found in compare(wanted, arguments.only, **settings, lock=arguments.lock):
            print(_report.table(found), flush=True)
            rows += found
            # After each, so that a run that is cut off leaves something.
            write(output, _report.document(where, rows, {}))
    chart(output)
    print(f"wrote {output} and its pictures")


if __name__ == "__main__":
    main()
