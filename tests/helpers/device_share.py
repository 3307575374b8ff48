"""What a compiled program for GPUs asks of one device: messages, launches, size and memory."""

import collections
import dataclasses
import re

from tests.helpers import compile_target
from tests.helpers.hlo import Collective, collectives

PAIRS = re.compile(r"source_target_pairs=\{.*?\}\}")
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%\S+ = .*$", re.MULTILINE)
# Python's call stack, which depends on what was traced before in the same process.
METADATA = re.compile(r", metadata=\{.*?\}")
# The number of devices has one digit or two, and so have the names of instructions.
DIGITS = re.compile(r"[\d.]+")


@dataclasses.dataclass(frozen=True)
class Share:
    """Of one device.

    ``characters`` are those of the instructions around the kernels, without numbers; ``temporary``
    is in bytes.
    """

    collectives: tuple[Collective, ...]
    launches: collections.Counter
    instructions: int
    characters: int
    temporary: int


def share_of(compiled):
    """Share."""
    text = compiled.as_text()
    instructions = INSTRUCTION.findall(text)
    # The text of a kernel names source files, too.
    around = [line for line in instructions if not compile_target.LAUNCH.search(line)]
    return Share(
        tuple(collectives(text)),
        collections.Counter(compile_target.LAUNCH.findall(text)),
        len(instructions),
        sum(len(DIGITS.sub("", METADATA.sub("", PAIRS.sub("", line)))) for line in around),
        compiled.memory_analysis().temp_size_in_bytes,
    )
