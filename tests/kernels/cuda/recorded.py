"""Arithmetic instructions of kernels where they multiply, by case and architecture, as they were
when somebody last meant to change them: `machine_code.json`. A test file of machine code, run as a
program (`python -P FILE`), writes its own part of it anew, case by case."""

import json
import re
import subprocess
from pathlib import Path

from quantlib.kernels.cuda import machine_code, toolkit

RECORD = Path(__file__).with_name("machine_code.json")
MOST_GROWTH = 1.2


def has_not_grown(name: str, code: machine_code.MachineCode) -> bool:
    """Whether a kernel has at most a fifth more of them than it was recorded with."""
    return code.arithmetic <= MOST_GROWTH * json.loads(RECORD.read_text())["arithmetic"][name]


def write(rows: dict[str, int]) -> None:
    """Put these rows in the place of those of the same names."""
    before = json.loads(RECORD.read_text())["arithmetic"] if RECORD.exists() else {}
    done = subprocess.run([str(toolkit.find_nvcc()), "--version"], capture_output=True, text=True)
    version = re.search(r"release ([\d.]+)", done.stdout)
    compiler = f"nvcc {version[1] if version else ''}".strip()
    found = {"compiler": compiler, "arithmetic": before | rows}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
