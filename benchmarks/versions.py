"""Times these kernels beside those of another checkout: ``python -m benchmarks.versions FOLDER``.

Both versions, this one a second time, and the peers that are installed take turns in one process,
as a GPU's clock differs between processes. Prints medians, and the quartiles of the ratios to the
other version and to each peer, round by round; writes JSON.

A checkout of another commit: ``git worktree add FOLDER COMMIT``.
"""

import argparse
import importlib
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

import ring_swa_jax
from benchmarks import _markdown
from benchmarks._gpus import hold, share_machine
from benchmarks._peers import CONTENDERS, Contender, ours
from benchmarks._report import KINDS, TITLES
from benchmarks._results import write
from benchmarks._shapes import ALL, Shape
from benchmarks._timing import median_of, ratio_quartiles
from benchmarks.attention import arrays, build, checked_times, machine

PACKAGES = ("pallas_kernels", "ring_swa_jax")
BEFORE, NOW, AGAIN = "before", "now", "now again"
PEERS = ("fa3", "cudnn")


def package_of(checkout: Path, folder: Path) -> ModuleType:
    """The package ``ring_swa_jax`` of a checkout, under another name, from a copy in a folder."""
    names = re.compile(rf"\b({'|'.join(PACKAGES)})\b")
    for package in PACKAGES:
        for path in (checkout / package).rglob("*.py"):
            copy = folder / f"{package}_before" / path.relative_to(checkout / package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(names.sub(r"\1_before", path.read_text(encoding="utf-8")), "utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module("ring_swa_jax_before")


def compiled(shape: Shape, contenders: dict[str, Contender]) -> dict[str, Any]:
    """By contender what `build` returns."""
    with ThreadPoolExecutor(len(contenders)) as pool:
        found = pool.map(partial(build, shape), contenders.values())
        return dict(zip(contenders, found, strict=True))


def table(shape: Shape, times: dict[tuple[str, str], list[float]]) -> str:
    """Of one shape: a line for each contender and kind."""
    bases = [name for name in (BEFORE, *PEERS) if any(key[0] == name for key in times)]

    def over(seconds, base, kind):
        quartiles = ratio_quartiles(seconds, times.get((base, kind), []))
        return "-" if quartiles is None else " ".join(f"{x:.3f}" for x in quartiles)

    head = [shape.name, "", "ms", *(f"over {name}: quartiles" for name in bases)]
    lines = [
        [TITLES[kind], name, f"{1e3 * (median_of(seconds) or 0):.4f}"]
        + [over(seconds, base, kind) for base in bases]
        for (name, kind), seconds in sorted(times.items(), key=lambda x: KINDS.index(x[0][1]))
    ]
    return _markdown.table(head, lines)


def main() -> None:
    """Compiles, times, prints and writes shape by shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, metavar="FOLDER", help="of the other version")
    parser.add_argument("--shapes", nargs="+", choices=list(ALL), default=["mistral", "full16k"])
    parser.add_argument("--implementation", help="default: the best for the device")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a smoke test")
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--lock", type=Path, help="folder of locks, one for each GPU")
    arguments = parser.parse_args()
    share_machine()
    found: dict[str, Any] = {"machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        versions = {BEFORE: package_of(arguments.checkout, Path(folder)), NOW: ring_swa_jax}
        versions[AGAIN] = ring_swa_jax
        contenders = {
            name: Contender(ours(arguments.implementation, package))
            for name, package in versions.items()
        }
        contenders |= {name: CONTENDERS[name] for name in PEERS}
        for name in arguments.shapes:
            shape = ALL[name].tiny() if arguments.quick else ALL[name]
            built = compiled(shape, contenders)
            inputs = jax.jit(partial(arrays, shape)).lower().compile()
            hold(arguments.lock, range(1))  # nothing has run on the GPU yet
            seconds = 0.001 if arguments.quick else 0.05
            times, reasons = checked_times(built, inputs(), arguments.rounds, seconds)
            lines = [f"{shape.name}, {x}: {reason}" for x, reason in reasons.items()]
            print(*lines, table(shape, times), sep="\n", flush=True)
            rounds = [{"name": n, "kind": kind, "seconds": t} for (n, kind), t in times.items()]
            found["rows"].append({"shape": shape.name, "rounds": rounds})
            if arguments.output is not None:  # after each, so that a run that is cut off leaves it
                write(arguments.output, found)


if __name__ == "__main__":
    main()
