"""Compiles a training step for many absent GPUs: ``python -m benchmarks.model_compile 8 64 256``.

The step of `benchmarks.model`, of a small model of two local and two full layers in turns, for
meshes of so many H100 that cut one sequence, with as many tokens on each. Prints and writes a
device's memory, the bytes of its collectives, the program's size and the seconds to compile. What
it needs installed is said in `tests.helpers.compile_target`.

Up to eight GPUs, a host's number, full layers exchange heads; beyond, as on several hosts, they
take the balanced ring.
"""

import argparse
import collections
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from benchmarks._model_contenders import OURS
from benchmarks._model_decoder import Decoder
from benchmarks._model_sharding import AXES
from benchmarks._model_sizes import SMALL, ModelSize
from benchmarks._model_step import GPU_OPTIONS, Training

HOST = 8
TOKENS = 2048
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
SHAPE = re.compile(rf"\b({'|'.join(BYTES)})\[([0-9,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"= (?P<shape>[^=]*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
CALL = re.compile(r"(?:body|calls|to_apply|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)")
COMMENT = re.compile(r"/\*.*?\*/")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def _bytes_of(shape: str) -> int:
    sizes = (BYTES[t] * math.prod(map(int, filter(None, n.split(",")))) for t, n in
             SHAPE.findall(shape))  # fmt: skip
    return sum(sizes)


def moved_bytes(hlo: str, devices: int) -> dict[str, float]:
    """By kind of collective, bytes of its whole array or message on a device, in all executions.

    The whole array is an all-gather's result, the operand of a reduce-scatter. What is inside a
    loop counts as often as the loop runs.
    """
    own: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    calls: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    computation = entry = ""
    for text in hlo.splitlines():
        if header := COMPUTATION.match(text):
            computation = header[1]
            entry = computation if text.startswith("ENTRY") else entry
            continue
        text = COMMENT.sub("", text)
        if match := COLLECTIVE.search(text):
            kind, size = match["kind"], float(_bytes_of(match["shape"]))
            cuts = kind in ("all-gather", "reduce-scatter")
            if match["start"]:  # operands stand beside results
                size *= devices / (devices + 1) if cuts else 0.5
            elif kind == "reduce-scatter":
                size *= devices
            own[computation][kind] += round(size)
        trips = int(found[1]) if (found := TRIPS.search(text)) else 1
        for names in CALL.findall(text):
            calls[computation] += [(name.strip(" %"), trips) for name in names.split(",")]

    def total(name: str, times: int) -> collections.Counter[str]:
        found = collections.Counter({kind: size * times for kind, size in own[name].items()})
        for callee, trips in calls[name]:
            found += total(callee, times * trips)
        return found

    return dict(total(entry, 1))


def size_for(devices: int) -> ModelSize:
    """The model, with the exchange that so many GPUs take."""
    if devices <= HOST:
        return SMALL
    kinds = SMALL.attention.kinds
    kinds = kinds | {"global": kinds["global"] | {"exchange": "ring"}}
    return dataclasses.replace(SMALL, attention=dataclasses.replace(SMALL.attention, kinds=kinds))


def compiled(devices: int) -> dict[str, Any]:
    """A row of the table."""
    from tests.helpers import compile_target

    gpus = compile_target.mesh(devices).devices.reshape(1, devices)
    training = Training(
        Decoder(size_for(devices)), Mesh(gpus, AXES, axis_types=(AxisType.Auto,) * 2)
    )
    step = training.lower(OURS, 1, TOKENS * devices).compile(GPU_OPTIONS)
    hlo = step.call.as_text()
    return {
        "devices": devices,
        "seconds": step.seconds,
        "memory": step.memory(),
        "instructions": len(re.findall(r"^ +(?:ROOT )?%\S+ = ", hlo, re.MULTILINE)),
        "moved": moved_bytes(hlo, devices),
    }


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    memory = {kind: size / 2**20 for kind, size in row["memory"].items()}
    moved = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in row["moved"].items())
    return (
        f"{row['devices']:4d} GPUs: {row['seconds']:4.0f} s, {row['instructions']} instructions, "
        f"{memory['all']:.0f} MiB ({memory['temporary']:.0f} temporary), {moved}"
    )


def main() -> None:
    """Prints a line a mesh and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("devices", type=int, nargs="*", default=[8, 64, 256])
    output = Path(__file__).parent / "results" / "model-compile-h100.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    size = SMALL
    print(f"jax {jax.__version__}, {size.layers} layers, {size.features} features, {TOKENS} tokens")
    rows = []
    for devices in arguments.devices:
        rows.append(compiled(devices))
        print(line(rows[-1]), flush=True)
        machine = {"device": "H100, compiled for without one", "jax": jax.__version__}
        document = {"machine": machine, "tokens": TOKENS, "rows": rows}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
