"""What a compiler made of a kernel, read from its machine code: what a GPU will really do.

nvdisasm prints a cubin's instructions; here they are counted, in the whole kernel and in the basic
blocks that multiply (those with a matrix instruction), which is where a loop's cost is.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from quantlib.kernels.cpu.build import BuildError
from quantlib.kernels.cuda.toolkit import find_nvdisasm

MATRIX = ("HMMA", "IMMA", "QMMA", "OMMA")
"""Matrix products, by the part of their name before the first dot."""
ARITHMETIC: tuple[str, ...] = (
    *("LOP3", "PRMT", "SHF", "HFMA2", "HADD2", "HMUL2", "IMAD", "IADD3", "LEA"),
    *("FFMA", "FMUL", "FADD", "MOV", "SEL", "ISETP", "I2F", "CS2R"),
)
"""What competes with matrix products for issue slots."""

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^\s,]+),.*$", re.MULTILINE)
_LABEL = re.compile(r"^\s*\.L_[\w]+:")
_ENDS_BLOCK = ("BRA", "EXIT", "RET", "CALL", "BRX", "WARPSYNC")


@dataclass(frozen=True)
class MachineCode:
    """Instructions of a kernel: full names, such as "LDGSTS.E.BYPASS.LTC128B.128", in order, in
    basic blocks."""

    blocks: tuple[tuple[str, ...], ...]

    @property
    def instructions(self) -> list[str]:
        """All of them."""
        return [name for block in self.blocks for name in block]

    def count(self, pattern: str) -> int:
        """How many names the regular expression matches from their beginning."""
        return sum(1 for name in self.instructions if re.match(pattern, name))

    def multiplying(self) -> Counter[str]:
        """Instructions of the blocks that multiply, by the first part of their names."""
        chosen = [block for block in self.blocks if any(_is_matrix(name) for name in block)]
        return Counter(name.partition(".")[0] for block in chosen for name in block)

    def around(self, pattern: str) -> int:
        """Instructions of the blocks that have one whose name the regular expression matches."""
        chosen = (b for b in self.blocks if any(re.match(pattern, name) for name in b))
        return sum(len(block) for block in chosen)

    def arithmetic_around(self, pattern: str) -> int:
        """Arithmetic instructions of the blocks that do not multiply and have one whose name the
        regular expression matches."""
        chosen = (b for b in self.blocks if any(re.match(pattern, name) for name in b))
        apart = (b for b in chosen if not any(_is_matrix(name) for name in b))
        return sum(name.partition(".")[0] in ARITHMETIC for block in apart for name in block)

    @property
    def products(self) -> int:
        """Matrix products."""
        return sum(self.multiplying()[name] for name in MATRIX)

    @property
    def arithmetic(self) -> int:
        """Arithmetic instructions of the blocks that multiply."""
        return sum(self.multiplying()[name] for name in ARITHMETIC)


def read(cubin: bytes) -> MachineCode:
    """Disassemble a cubin of one kernel. Raises BuildError when nvdisasm is missing or fails."""
    return parse(_listing(cubin))


def read_all(cubin: bytes) -> dict[str, MachineCode]:
    """Disassemble a cubin: its kernels by their (mangled) names. Raises BuildError as `read`."""
    return parse_all(_listing(cubin))


def _listing(cubin: bytes) -> str:
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise BuildError("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(nvdisasm), "-c", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise BuildError(f"nvdisasm failed: {done.stderr.strip()}")
    return done.stdout


def parse(listing: str) -> MachineCode:
    """The instructions in what `nvdisasm -c` prints."""
    blocks: list[list[str]] = [[]]
    for line in listing.splitlines():
        if _LABEL.match(line):
            blocks.append([])
        elif match := _INSTRUCTION.match(line):
            blocks[-1].append(match[1])
            if match[1].partition(".")[0] in _ENDS_BLOCK:
                blocks.append([])
    return MachineCode(tuple(tuple(block) for block in blocks if block))


def parse_all(listing: str) -> dict[str, MachineCode]:
    """The same of several kernels, by their names."""
    _, *parts = _SECTION.split(listing)
    return {name: parse(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _is_matrix(name: str) -> bool:
    return name.partition(".")[0] in MATRIX
