"""The command line of `train_lm.py`."""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import pallas_kernels

from _checkpoint import RunFolder
from _devices import CPU_DEVICES
from _model import patterns
from _settings import PRESETS, Settings, default_layers, fitted, preset_for
from _tokenizer import SMALLEST_VOCABULARY

# Flags that are fields of Settings.
KEPT = tuple(field.name for field in dataclasses.fields(Settings))


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `least` on."""

    def whole_number(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{number} is less than {least}")
        return number

    return whole_number


def positive(text: str) -> float:
    """A type for argparse: numbers above zero."""
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return number


def share(text: str) -> float:
    """A type for argparse: numbers from 0 to 1."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def picture(text: str) -> pathlib.Path:
    """A type for argparse: the name of a picture's file."""
    path = pathlib.Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text} ends neither in .png nor in .pdf nor in .svg")
    return path


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """All flags. Those that are None take the preset's value."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_training(parser.add_argument_group("training, the preset's values where left out"))
    _add_model(parser.add_argument_group("model, the preset's values where left out"))
    _add_devices(parser.add_argument_group("devices"))
    _add_run(parser.add_argument_group("this run"))
    return parser


def _add_training(group: Any) -> None:
    group.add_argument("--steps", type=at_least(1))
    group.add_argument("--sequence-length", type=at_least(1), help="in tokens, over all devices")
    group.add_argument("--short-length", type=at_least(1), help="of sequences in the first steps")
    group.add_argument("--short-share", type=share, help="which part of the steps these are")
    group.add_argument("--batch-size", type=at_least(1), help="sequences in a step")
    group.add_argument(
        "--document-length", type=at_least(2), help="in tokens; longer files are cut up"
    )
    group.add_argument("--learning-rate", type=positive, help="at its peak")
    group.add_argument("--seed", type=at_least(0), help="of parameters, data and sampling")
    group.add_argument(
        "--text",
        help="folder whose .py, .md, .rst and .txt files are the text "
        "(default: the source files of Python's standard library)",
    )


def _add_model(group: Any) -> None:
    group.add_argument(
        "--preset",
        choices=PRESETS,
        help="laptop, or gpu, which fits the card's memory (default: by the device)",
    )
    group.add_argument("--model", choices=patterns(0), help="its kind")
    group.add_argument("--layers", type=at_least(1), help="a multiple of the kind's pattern")
    group.add_argument("--vocabulary", type=at_least(SMALLEST_VOCABULARY), help="most tokens")
    group.add_argument(
        "--window",
        type=at_least(0),
        help="tokens that a local layer looks back, besides the token itself",
    )
    group.add_argument(
        "--sinks",
        type=at_least(0),
        help="first tokens of its document that every token sees besides, in layers with a window "
        "(default: 4 in sliding-window, else 0)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="in which it computes; parameters are float32",
    )


def _add_devices(group: Any) -> None:
    group.add_argument(
        "--devices", type=at_least(1), help=f"(default: all GPUs, or {CPU_DEVICES} CPU devices)"
    )
    group.add_argument(
        "--data",
        type=at_least(1),
        default=1,
        help="in how many parts the batch is cut; the other devices share the sequence "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--implementation",
        choices=pallas_kernels.IMPLEMENTATIONS,
        help="of the attention (default: the best for the device)",
    )
    group.add_argument("--coordinator", help="several processes: host:port of process 0")
    group.add_argument("--num-processes", type=at_least(1), help="how many there are")
    group.add_argument("--process-id", type=at_least(0), help="which of them this is, from 0")
    group.add_argument("--distributed", action="store_true", help="find these three by itself")


def _add_run(group: Any) -> None:
    default = "(default: %(default)s)"
    group.add_argument(
        "--folder", type=pathlib.Path, help="checkpoints, log and loss curve (default: runs/TIME)"
    )
    group.add_argument(
        "--resume", type=pathlib.Path, metavar="FOLDER", help="go on with the run of this folder"
    )
    group.add_argument("--checkpoint-every", type=at_least(1), default=100, help=f"steps {default}")
    group.add_argument("--evaluate-every", type=at_least(1), default=50, help=f"steps {default}")
    group.add_argument(
        "--output", type=picture, help="the loss curve (default: loss.png in the folder)"
    )
    group.add_argument(
        "--sample-length", type=at_least(1), default=150, help=f"in tokens {default}"
    )
    group.add_argument("--temperature", type=positive, default=0.5, help=f"of the sample {default}")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program, in argparse's form, where flags contradict each other."""
    if args.coordinator and (args.num_processes is None or args.process_id is None):
        parser.error("--coordinator needs --num-processes and --process-id")
    if not args.coordinator and (args.num_processes, args.process_id) != (None, None):
        parser.error("--num-processes and --process-id need --coordinator")
    if args.coordinator and args.process_id >= args.num_processes:
        parser.error(f"--process-id {args.process_id}: there are {args.num_processes}, from 0")
    processes = args.num_processes or 1
    devices = args.devices or CPU_DEVICES
    if devices % processes:
        parser.error(f"--devices {devices} is not a multiple of --num-processes {processes}")
    if args.text and not pathlib.Path(args.text).is_dir():
        parser.error(f"--text {args.text}: no such folder")
    if args.resume:
        _check_resume(parser, args)
    elif args.folder and RunFolder(args.folder).exists():
        parser.error(f"--folder {args.folder} holds a run: --resume it, or name another folder")


def _check_resume(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not RunFolder(args.resume).exists():
        parser.error(f"--resume {args.resume}: no run is in this folder")
    if args.folder:
        parser.error("--resume goes on in its own folder: leave --folder out")
    given = [name for name in ("preset", *KEPT) if getattr(args, name, None) is not None]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        parser.error(f"--resume takes the settings of its run: leave out {names}")


def settings_of(args: argparse.Namespace, devices: int) -> Settings:
    """The settings of the run that is resumed, or those of the preset and the flags.

    Raises:
        ValueError: they do not go together, or not with the devices.
    """
    sequence_devices = devices // args.data
    if args.resume:
        settings = RunFolder(args.resume).settings()
    else:
        device = jax.devices()[0]
        preset = args.preset or preset_for(device)
        values = fitted(preset, device, sequence_devices)
        given = {name: getattr(args, name, None) for name in KEPT}
        values |= {name: value for name, value in given.items() if value is not None}
        values.setdefault("layers", default_layers(preset, values["model"]))
        if args.batch_size is None:
            values["batch_size"] = args.data
        settings = Settings(**values)
    check_settings(settings, args.data, sequence_devices)
    return settings


def check_settings(settings: Settings, data: int, sequence_devices: int) -> None:
    """Raises ValueError where settings do not go together, or not with the devices."""
    length = len(patterns(0)[settings.model])
    if settings.layers % length:
        raise ValueError(
            f"--layers {settings.layers}: {settings.model} needs a multiple of {length}"
        )
    if settings.batch_size % data:
        raise ValueError(f"--data {data} does not divide --batch-size {settings.batch_size}")
    shortest = settings.sequence_length
    used = {"--sequence-length": settings.sequence_length}
    if settings.short_steps:
        used["--short-length"] = shortest = settings.short_length
    for flag, number in used.items():
        if number % sequence_devices:
            raise ValueError(f"{sequence_devices} devices do not divide {flag} {number}")
    chunk = shortest // sequence_devices
    if sequence_devices > 1 and (settings.sinks or 0) > chunk:
        raise ValueError(f"--sinks {settings.sinks}: a device holds {chunk} tokens of a sequence")


def folder_of(args: argparse.Namespace) -> RunFolder:
    """Where the run is kept, the same in all processes."""
    if args.resume or args.folder:
        return RunFolder(args.resume or args.folder)
    now = int(multihost_utils.broadcast_one_to_all(np.int32(time.time())))
    return RunFolder(pathlib.Path("runs", time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(now))))
