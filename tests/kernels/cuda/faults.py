"""Faults that are put into a kernel's source one at a time, and who notices them: what the mutation
tests share.

A fault is a piece of a source file and what stands there instead, or several of them. It is noticed
when the emulator refuses the kernel, when a result is not right, or, for those that only cost time,
when there are bank conflicts.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from quantlib.kernels.emulator.machine import Counters, KernelFault

Piece = tuple[str, str, str]
"""A file beside the kernel, what stands there, what stands there instead."""
Fault = Piece | tuple[Piece, ...]
Run = Callable[[], str | None]
"""A run of a kernel: what was found to be wrong, None: nothing."""


def mutated(folder: Path, source: Path, fault: Fault | None) -> Path:
    """The kernel in a folder of its own, with the fault."""
    sources = folder / "src"
    shutil.copytree(source.parent, sources)
    pieces = () if fault is None else (fault,) if isinstance(fault[0], str) else fault
    for file, here, instead in pieces:
        text = (sources / file).read_text()
        assert here in text, "the source has moved on: say the fault anew"
        (sources / file).write_text(text.replace(here, instead))
    return sources / source.name


def noticed(runs: list[Run]) -> str | None:
    """What the first of the runs that finds something has found."""
    for run in runs:
        try:
            found = run()
        except (KernelFault, AssertionError) as fault:
            return str(fault)
        if found is not None:
            return found
    return None


def verdict(right: torch.Tensor, counters: Counters) -> str | None:
    """Of a run whose numbers are right where `right` is true."""
    if not right.all():
        return "wrong numbers"
    return "bank conflicts" if counters.bank_conflicts else None
