"""What the recipes' scripts share: their flags, and random documents packed into padded rows."""

import argparse
import pathlib

import jax
import numpy as np

STEPS = 4
VOCABULARY = 64
ROWS, LENGTH = 4, 32


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The client's folder, and whether its attention is ours."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=lambda name: pathlib.Path(name).resolve())
    parser.add_argument("--ours", action="store_true", help="the recipe's lines are in the folder")
    return parser


def start(description: str | None) -> argparse.Namespace:
    """The flags; JAX then has eight CPU devices for our attention, and one for theirs."""
    args = make_parser(description).parse_args()
    jax.config.update("jax_num_cpu_devices", 8 if args.ours else 1)
    return args


def packed(step: int) -> dict[str, np.ndarray]:
    """The batch of a step, arrays [ROWS, LENGTH] by MaxText's and flax's names; 0 is padding."""
    rng = np.random.default_rng(step)
    names = ("inputs", "targets", "inputs_position", "inputs_segmentation")
    batch = {name: np.zeros((ROWS, LENGTH), np.int32) for name in names}
    for row in range(ROWS):
        end = LENGTH - rng.integers(0, 6)
        bounds = [0, *sorted(rng.choice(np.arange(1, end), 2, replace=False)), end]
        for number in range(3):
            start, stop = bounds[number : number + 2]
            document = rng.integers(1, VOCABULARY, stop - start + 1)
            batch["inputs"][row, start:stop] = document[:-1]
            batch["targets"][row, start:stop] = document[1:]
            batch["inputs_position"][row, start:stop] = np.arange(stop - start)
            batch["inputs_segmentation"][row, start:stop] = number + 1
    return batch
