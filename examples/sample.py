"""Goes on with a text by a model that `train_lm.py` has trained.

    python examples/sample.py runs/TIME --prompt "def "

A layer with a window keeps its last W + 1 keys and the sinks in a rolling cache, whatever the
length of the text. The model comes from the newest checkpoint, whatever devices it was trained on.
"""

import argparse
import pathlib

from _checkpoint import Checkpoints, RunFolder
from _devices import one_device_mesh, replicated
from _flags import at_least, positive
from _sampling import continue_text
from _training import create_model


def main() -> None:
    """Reads the run's folder and prints the text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "(default: %(default)s)"
    parser.add_argument("folder", type=pathlib.Path, help="of the run")
    parser.add_argument("--prompt", default="", help="the beginning of the text (default: none)")
    parser.add_argument("--length", type=at_least(1), default=300, help=f"in tokens {default}")
    parser.add_argument("--temperature", type=positive, default=0.5, help=default)
    parser.add_argument("--seed", type=at_least(0), default=0, help=default)
    parser.add_argument("--step", type=at_least(1), help="of the checkpoint (default: the newest)")
    args = parser.parse_args()

    folder = RunFolder(args.folder)
    if not folder.exists():
        parser.error(f"no run is in {args.folder}")
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    step = args.step or max(steps, default=None)
    if step not in steps:
        parser.error(f"--step {step}: there are checkpoints of {steps}")
    tokenizer = folder.tokenizer()
    mesh = one_device_mesh()
    model = create_model(folder.settings(), tokenizer.size, None, mesh)
    checkpoints.restore(step, replicated(mesh), model=model)
    more = continue_text(model, tokenizer, args.prompt, args.length, args.temperature, args.seed)
    print(args.prompt + more)


if __name__ == "__main__":
    main()
