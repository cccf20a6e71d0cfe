"""Which operator each layer gets: mixed non-linear quantization (arXiv 2407.18437).

Every method is tried on every layer, and its signal over noise is measured; the papers' point is
that no method is best for all. Here the fewest bits that are good enough come first, then the
better method; a layer that no method is good enough for stays in floats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quantlib.errors import UsageError
from quantlib.kernels.nonlinear.operators import Operator

Fits = Mapping[str, Mapping[str, tuple[Operator, float]]]
"""Layer -> method -> the operator with its grids, and its SQNR in dB."""

_PATTERN = re.compile(r"(sqnr|output)=(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Rule:
    """`sqnr=30`: a layer computes in integers if its own output keeps 30 dB of signal over noise.
    `output=20`: as many layers do as leave the encoders' outputs 20 dB.
    """

    of: Literal["sqnr", "output"]
    decibels: float

    @staticmethod
    def parse(text: str) -> Rule:
        """Raises UsageError for anything else."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{text!r} says not how good integer softmax, GELU and LayerNorm must be: use "
                "sqnr=30 (dB of signal over noise, of every layer) or output=20 (of the encoder)"
            )
        return Rule("sqnr" if match[1] == "sqnr" else "output", float(match[2]))

    def __str__(self) -> str:
        return f"{self.of}={self.decibels:g}"


def choose(fits: Fits, decibels: float) -> dict[str, Operator]:
    """Layer -> operator, for the layers that some method keeps so many dB of."""
    chosen = {}
    for name, methods in fits.items():
        enough = [found for found in methods.values() if found[1] >= decibels]
        if enough:
            chosen[name] = min(enough, key=lambda found: (found[0].bits, -found[1]))[0]
    return chosen


def thresholds(fits: Fits) -> list[float]:
    """The finite SQNRs at which `choose` changes, rising, and one above all: nothing is chosen."""
    found = {sqnr for methods in fits.values() for _, sqnr in methods.values()}
    return [*sorted(sqnr for sqnr in found if math.isfinite(sqnr)), math.inf]
