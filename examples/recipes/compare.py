"""Compares the losses of a client's training code with its own attention and with ours.

    python examples/recipes/compare.py flax_gemma path/to/flax/examples/gemma

Runs the recipe's script on the client as it is, on one device, and on a copy to which the recipe's
lines (flax_gemma.diff) were applied, on eight CPU devices. Fails if the losses differ.
"""

import argparse
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
RECIPES = sorted(path.stem for path in HERE.glob("*.diff"))


def losses(recipe: str, folder: pathlib.Path, *flags: str) -> list[float]:
    """What the recipe's script prints for this copy of the client."""
    command: list[str | pathlib.Path] = [sys.executable, HERE / f"{recipe}.py", folder, *flags]
    run = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [float(loss) for loss in re.findall(r"^loss (\S+)$", run.stdout, re.MULTILINE)]


def with_our_lines(recipe: str, folder: pathlib.Path, copy: pathlib.Path) -> pathlib.Path:
    """A copy of the client with the recipe's lines."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    lines = HERE / f"{recipe}.diff"
    command: list[str | pathlib.Path] = ["patch", "--quiet", "-p1", "-d", copy, "-i", lines]
    subprocess.run(command, check=True)
    return copy


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("folder", type=pathlib.Path, help="the client's code")
    args, flags = parser.parse_known_args()
    folder = args.folder.resolve()
    theirs = losses(args.recipe, folder, *flags)
    with tempfile.TemporaryDirectory() as place:
        copy = with_our_lines(args.recipe, folder, pathlib.Path(place, folder.name))
        ours = losses(args.recipe, copy, "--ours", *flags)
    print("step     theirs       ours")
    for step, pair in enumerate(zip(theirs, ours, strict=True), start=1):
        print("{:4}  {:9.7f}  {:9.7f}".format(step, *pair))
    if not all(math.isclose(*pair, rel_tol=1e-5) for pair in zip(theirs, ours, strict=True)):
        raise SystemExit("the losses differ")


if __name__ == "__main__":
    main()
