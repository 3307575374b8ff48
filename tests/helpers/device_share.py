"""What a compiled program for GPUs asks of one device: messages, launches, size and memory."""

import collections
import dataclasses
import re

from tests.helpers import compile_target
from tests.helpers.hlo import Collective, collectives

PAIRS = re.compile(r"source_target_pairs=\{.*?\}\}")
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%\S+ = ", re.MULTILINE)
# The number of devices has one digit or two, and so have the names of instructions.
DIGITS = re.compile(r"[\d.]+")


@dataclasses.dataclass(frozen=True)
class Share:
    """Of one device; the text's characters without numbers, ``temporary`` in bytes."""

    collectives: tuple[Collective, ...]
    launches: collections.Counter
    instructions: int
    characters: int
    temporary: int


def share_of(compiled):
    """Share."""
    text = compiled.as_text()
    return Share(
        tuple(collectives(text)),
        collections.Counter(compile_target.LAUNCH.findall(text)),
        len(INSTRUCTION.findall(text)),
        len(DIGITS.sub("", PAIRS.sub("", text))),
        compiled.memory_analysis().temp_size_in_bytes,
    )
