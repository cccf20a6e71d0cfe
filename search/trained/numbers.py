"""What a layer may be trained in: candidates, and the spaces that a search chooses from.

A candidate rounds a layer's weight and its inputs, and is a scheme of quantlib's, so that what is
found can be stored and run. Small floats have a short name for weights and inputs together: `eXmY`,
with X exponent and Y mantissa bits (`formats.elements`), since a search over number formats asks
which of them are worth building (FLIQS, arXiv 2308.03290). Weights then have one scale per output
channel, inputs one per token, which takes the largest magnitude to the largest number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantlib.errors import SearchError
from quantlib.formats.activation import UNROUNDED
from quantlib.formats.elements import FLOAT_NAMES, FLOATS
from quantlib.formats.scheme import Scheme

_FLOAT = re.compile(r"e[1-9]m[0-9]")
_SCHEME_NAMES = {element: name for name, element in FLOAT_NAMES.items()}


@dataclass(frozen=True)
class Candidate:
    """How a layer's weight and inputs are rounded.

    name: the scheme's.
    """

    name: str
    scheme: Scheme

    @staticmethod
    def parse(name: str) -> Candidate:
        """A scheme ("w4a4", "w4g64a8", "fp4afp4") or a float for both ("e3m2").

        Raises SearchError for a float that quantlib does not have, for a kept weight and for one of
        several matrices, FormatError for what is no scheme.
        """
        if _FLOAT.fullmatch(name):
            if name not in _SCHEME_NAMES:
                raise SearchError(
                    f"{name} is none of the floats that are trained: use one of "
                    f"{', '.join(sorted(FLOATS))}"
                )
            known = _SCHEME_NAMES[name]
            return Candidate.parse(f"{known}a{known}")
        scheme = Scheme.parse(name)
        if scheme.weight is None:
            raise SearchError(
                f"{name} rounds no weight, so there is nothing to train: leave it out, the "
                "full-precision model is trained beside"
            )
        if scheme.low_rank is not None or scheme.rows:
            raise SearchError(
                f"{name} is several matrices, and training rounds one: leave out the factors "
                "and the blocks of rows"
            )
        return Candidate(str(scheme), scheme)

    def bit_products(self, columns: int) -> float:
        """Weight bits times input bits of a multiplication, the mean over the K columns."""
        inputs = [part.format.bits for part in self.scheme.activations(columns)]
        weights = self.scheme.segments(columns)
        pairs = zip(weights, inputs or [UNROUNDED] * len(weights), strict=True)
        return sum(part.format.bits * bits * part.length for part, bits in pairs) / columns


def _integers(*bits: int) -> tuple[str, ...]:
    return tuple(f"w{b}a{b}" for b in bits)


def _floats(fewest: int, most: int) -> tuple[str, ...]:
    """All of so many bits, with two exponent bits or more and a mantissa: with one exponent bit
    they are integers."""
    pairs = [(e, bits - 1 - e) for bits in range(fewest, most + 1) for e in range(2, 6)]
    return tuple(f"e{e}m{m}" for e, m in pairs if m >= 1)


_PAIRS = (
    *("w2a5", "w3a4", "w3a5", "w4a4", "w3a6"),
    *("w4a5", "w4a6", "w5a6", "w6a6", "w8a8"),
)
_MIXED_PAIRS = (*_PAIRS, "fp4afp4", "w3afp4", "w4afp4", "fp6e2m3afp6e2m3")
_FOURS = ("w4a4", "w4a4z", "fp4afp4", "w4afp4")
_ZERO_PAIRS = ("w2a5z", "w3a4z", "w3a5z", "w4a4z", "w3a6z", "w4a5z")


SPACES: dict[str, tuple[str, ...]] = {
    "int-s": _integers(4, 8),
    "int-l": _integers(4, 5, 6, 7, 8),
    "int-xl": _integers(3, 4, 5, 6, 8),
    "float-s": ("e2m1", "e4m3"),
    "float-l": _floats(4, 8),
    "float": ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2"),
    "mixed-l": (*_integers(4, 5, 6, 7, 8), *_floats(4, 8)),
    "mixed-xl": (*_integers(3, 4, 5, 6, 8), "e2m1", "e2m3", "e3m2", "e4m3"),
    "int-pairs": _PAIRS,
    "mixed-pairs": _MIXED_PAIRS,
    "zero-pairs": (*_MIXED_PAIRS, *_ZERO_PAIRS),
    "fours": _FOURS,
    "columns": ("w4a4", "w4a4h8/8", "w4a4h8/4", "w4a4h8/2", "w8a8"),
    "weights": ("w2g64z", "w3g64z", "w4g64", "w5g64", "w6g64", "w8g64"),
}
"""Named lists of candidates. The S and L of FLIQS are "int-s", "int-l", "float-s", "float-l".

At the cost of uniform 4-bit numbers a space that begins at 4 bits leaves nothing to choose; those
called xl go down to 3, and those called pairs give weights and inputs widths of their own: inputs
behind a ReLU use half of a symmetric range, and weights adapt to few bits while they train. The
inputs of "zero-pairs" may have zero points, where one reaches farther up than down. "fours" are
numbers of 4 bits, integers and floats, which all cost the same. "float" are the floats of OCP;
"columns" choose how many of a layer's input channels are wider; "weights" leave inputs as they are.
"""


def space_of(names: str) -> tuple[Candidate, ...]:
    """A named space, or candidates apart by commas, each once.

    Raises SearchError when fewer than two are left to choose among.
    """
    listed = SPACES.get(names) or tuple(filter(None, (n.strip() for n in names.split(","))))
    found = {candidate.name: candidate for candidate in map(Candidate.parse, listed)}
    if len(found) < 2:
        known = ", ".join(SPACES)
        raise SearchError(
            f"{names!r} leaves nothing to choose: give two candidates or more, such as w4a4,w8a8, "
            f"or one of {known}"
        )
    return tuple(found.values())
