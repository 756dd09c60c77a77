"""Reads the machine code of a GPU as ``nvdisasm -c`` writes it: the instructions and loops of each kernel."""

from __future__ import annotations

import re
from typing import NamedTuple

LANES = 32


class Instruction(NamedTuple):
    address: int
    code: str
    """Without its predicate, as in ``LDG.E.128 R4, desc[UR4][R2.64]``."""


def count(instructions: list[Instruction], pattern: str) -> int:
    """The number of instructions that match ``pattern`` from their first letter on."""
    return sum(re.match(pattern, one.code) is not None for one in instructions)


def bytes_of(instructions: list[Instruction], name: str) -> int:
    """The bytes that a thread moves with the loads or stores called ``name`` (``LDG``, ``STG``)."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    codes = [one.code.split(maxsplit=1)[0].split(".") for one in instructions]
    return sum(next((widths[part] for part in parts if part in widths), 4) for parts in codes if parts[0] == name)


class Kernel(NamedTuple):
    name: str
    """Mangled."""
    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self) -> list[list[Instruction]]:
        """The instructions from the target of each backward branch up to the branch, the shortest first."""
        ends: dict[int, int] = {}
        for one in self.instructions:
            target = re.match(r"BRA\b.*?`\((\S+)\)", one.code)
            start = self.labels.get(target[1], one.address) if target else one.address
            if start < one.address:
                ends[start] = one.address
        return sorted(([one for one in self.instructions if start <= one.address <= end] for start, end in ends.items()), key=len)

    def main_loop(self) -> list[Instruction]:
        """The shortest of the loops with the most gates: a sigmoid of float32 takes one ``MUFU.EX2``. Empty: none has one."""
        loops = self.loops()
        gates = [count(loop, r"MUFU\.EX2") for loop in loops]
        return loops[gates.index(max(gates))] if any(gates) else []


def weights_of(loop: list[Instruction]) -> int:
    """Of one turn of a warp."""
    return LANES * count(loop, r"MUFU\.EX2")


def loaded_ahead(loop: list[Instruction]) -> int:
    """The bytes that a thread has asked for before its first gate waits for some of them."""
    first = next((i for i, one in enumerate(loop) if one.code.startswith("MUFU")), 0)
    return bytes_of(loop[:first], "LDG")


def parse(said: str) -> list[Kernel]:
    """The kernels of one file."""
    kernels: list[Kernel] = []
    for line in said.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([\w$]+)", line):
            kernels.append(Kernel(match[1], [], {}))
        elif not kernels:
            continue
        elif match := re.match(r"(\.L\w+):", line):
            last = kernels[-1].instructions
            kernels[-1].labels[match[1]] = last[-1].address + 16 if last else 0
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;", line):
            kernels[-1].instructions.append(Instruction(int(match[1], 16), match[2]))
    return kernels
