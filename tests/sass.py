"""What the compiler made of a kernel: its machine code, read by nvdisasm, as basic blocks."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


def find_nvdisasm() -> Path | None:
    """Of the CUDA toolkit on the path, or of the package nvidia-cuda-nvdisasm."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root).glob("*/bin/nvdisasm")):
            return path
    return None


@dataclass(frozen=True)
class Instruction:
    text: str

    @cached_property
    def body(self) -> str:
        """Without the predicate."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text)

    @cached_property
    def opcode(self) -> str:
        return self.body.split()[0]

    @property
    def conditional(self) -> bool:
        return self.text != self.body or "," in self.body

    @property
    def target(self) -> str | None:
        found = re.search(r"`\((\.L_x_\d+)\)", self.text)
        return found[1] if found and self.opcode.split(".")[0] == "BRA" else None

    @property
    def falls_through(self) -> bool:
        name = self.opcode.split(".")[0]
        return name not in ("BRA", "EXIT", "RET") or self.conditional

    @cached_property
    def _operands(self) -> list[str]:
        return self.body.partition(" ")[2].split(",")

    def _registers(self, operands: list[str]) -> frozenset[int]:
        width = 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1
        found = set()
        for operand in operands:
            for number, wide in re.findall(r"(?<!\w)R(\d+)(\.64)?", operand):
                found.update(range(int(number), int(number) + (2 if wide else width)))
        return frozenset(found)

    @cached_property
    def loads(self) -> frozenset[int]:
        """Registers that it fills from global memory some time later."""
        return self._registers(self._operands[:1]) if self.opcode[:4] == "LDG." else frozenset()

    @cached_property
    def waits_for(self) -> frozenset[int]:
        """Registers that have to be there before it is issued."""
        return self._registers(self._operands[1:] if self.loads else self._operands)


@dataclass
class Block:
    label: str
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)

    def count(self, opcode: str) -> int:
        return sum(i.opcode.startswith(opcode) for i in self.instructions)


def blocks_of(lines: list[str]) -> list[Block]:
    blocks = [Block("")]
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            blocks.append(Block(label[1]))
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            blocks[-1].instructions.append(instruction := Instruction(code[1]))
            if instruction.target or not instruction.falls_through:
                blocks.append(Block(""))
    places = {block.label: k for k, block in enumerate(blocks) if block.label}
    for k, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if last and last.target in places:
            block.successors.append(places[last.target])
        if (last is None or last.falls_through) and k + 1 < len(blocks):
            block.successors.append(k + 1)
    return blocks


def disassembled(nvdisasm: Path, cubin: Path) -> dict[str, list[Block]]:
    """The blocks of each function of a cubin, by its mangled name, in the order of addresses."""
    done = subprocess.run(
        [str(nvdisasm), "-c", str(cubin)], check=True, capture_output=True, text=True
    )
    functions: dict[str, list[str]] = {}
    name = None
    for line in done.stdout.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            functions[name := section[1]] = []
        elif name is not None:
            functions[name].append(line)
    return {name: blocks_of(lines) for name, lines in functions.items()}


def path_without_waiting(blocks: list[Block], end: int) -> int | None:
    """Instructions of the shortest way from the first block through block `end`, without a barrier,
    on which none waits for what another has loaded from global memory; None if there is none."""
    best: dict[tuple[int, frozenset[int]], int] = {}
    waiting = [(0, 0, frozenset())]
    while waiting:
        waiting.sort(reverse=True, key=lambda item: item[0])
        length, k, pending = waiting.pop()
        if best.get((k, pending), length + 1) <= length:
            continue
        best[k, pending] = length
        for instruction in blocks[k].instructions:
            if instruction.waits_for & pending or instruction.opcode.startswith("BAR."):
                break
            pending |= instruction.loads
            length += 1
        else:
            if k == end:
                return length
            waiting += [(length, n, pending) for n in blocks[k].successors]
    return None
