"""Reads compiled programs: collectives with their bytes, and the largest buffer."""

import dataclasses
import math
import re

KINDS = (
    "collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|"
    "collective-broadcast"
)
INSTRUCTION = re.compile(rf"= (?P<shape>[^=]*?) (?P<kind>{KINDS})(?P<start>-start)?\(")
SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
BYTES = dict(pred=1, s8=1, u8=1, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: bytes of its result on each device, and a permute's pairs."""

    kind: str
    bytes: int
    pairs: tuple = ()
    in_loop: bool = False


def shapes(text):
    """All (dtype, dims) in a piece of HLO."""
    return [
        (dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in SHAPE.findall(text)
    ]


def collectives(text):
    """Every collective of the compiled program."""
    bodies = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    found, computation = [], ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        if match := INSTRUCTION.search(line):
            size = sum(BYTES[d] * math.prod(dims) for d, dims in shapes(match["shape"]))
            if match["start"]:
                as_large = match["kind"] in ("collective-permute", "all-to-all")
                assert as_large, f"what of it is the result? {line}"
                size //= 2  # the operands, which are as large, stand beside the results
            pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
            pairs = re.findall(r"(\d+),(\d+)", pairs[1]) if pairs else ()
            pairs = tuple((int(a), int(b)) for a, b in pairs)
            found.append(Collective(match["kind"], size, pairs, computation in bodies))
    return found


def largest_buffer(text):
    """Number of elements of the largest array anywhere in the program."""
    return max(math.prod(dims) for _, dims in shapes(text))
